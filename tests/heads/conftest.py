"""What the tests of head mixes and blocks share."""

from __future__ import annotations

import pytest

from attnkit import (
    AttnkitError,
    CompetingMaskPredictor,
    Conv,
    CrossShaped,
    Dense,
    HeadMix,
    LearnedQuery,
    LearnedUpsample,
    Linformer,
    MaskPredictor,
    MaskReconstruction,
    Neighborhood,
    PaddedTopKRegion,
    PooledGlobal,
    RandomWindow,
    SoftTopKRegion,
    ThresholdMaskPredictor,
    TopKRegion,
    Window,
)
from attnkit.testing import randomize_parameters

# One of each primitive, for grids of about 4 x 6 tokens.
SAMPLES = {
    "conv": Conv(2),
    "cross_shaped": CrossShaped(2, 2),
    "dense": Dense(2, lepe=3),
    "learned_query": LearnedQuery(2, 3),
    "learned_query_strided": LearnedQuery(2, 3, stride=2),
    "learned_upsample": LearnedUpsample(2, 3),
    "linformer": Linformer(2, 16, 5),
    "mask_predictor": MaskPredictor(2, 24, 0.3),
    "threshold_mask_predictor": ThresholdMaskPredictor(2, 24, score=0.3),
    "competing_mask_predictor": CompetingMaskPredictor(2, 24, 0.3),
    "mask_reconstruction": MaskReconstruction(2, 24),
    "neighborhood": Neighborhood(2, 3, relative_bias=True),
    "pooled_global": PooledGlobal(2, 2),
    "random_window": RandomWindow(2, 5),
    "topk_region": TopKRegion(2, 2, 2),
    "topk_region_pooled": TopKRegion(2, 2, 2, qk_dim=4, pool="mean", pool_cells=1),
    "soft_topk_region": SoftTopKRegion(2, 2, 2, router="linear"),
    "padded_topk_region": PaddedTopKRegion(2, 3, 2),
    "window": Window(2, 3, partition="shifted", relative_bias=True),
}


@pytest.fixture(params=SAMPLES)
def sample(request):
    """Options of each primitive in turn."""
    return SAMPLES[request.param]


@pytest.fixture(scope="session")
def samples():
    """Options of all primitives by name."""
    return SAMPLES


@pytest.fixture(scope="session")
def random_mix():
    """random_mix(groups, head_dim=, seed=) -> HeadMix in evaluation mode, float32 unless said otherwise."""

    def make(groups, *, head_dim=4, seed=0, **extra):
        groups = groups if isinstance(groups, list) else [groups]
        dim = extra.pop("dim", head_dim * sum(group.heads for group in groups))
        mix = HeadMix(dim, groups, head_dim=head_dim, **extra)
        return randomize_parameters(mix.eval(), seed=seed, scale=0.4)

    return make


@pytest.fixture
def refused():
    """refused(function, *parts): it raises one sentence of the one error family that holds all parts."""

    def check(function, *parts):
        with pytest.raises(AttnkitError) as caught:
            function()
        text = str(caught.value)
        assert "\n" not in text and not text.endswith(".")
        for part in parts:
            assert part in text, text

    return check
