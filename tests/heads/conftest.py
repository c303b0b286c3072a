"""What the tests of mixes and blocks share: one small mix of every registered primitive."""

from __future__ import annotations

import pytest
import torch

from attnkit import HeadMix
from attnkit.errors import AttnkitError
from attnkit.registry import PRIMITIVES

# Options with learned parts switched on, so that every parameter takes part.
SMALL = {
    "dense": {"heads": 2},
    "window": {"heads": 2, "window": 2, "relative_bias": True},
    "cross_shaped": {"heads": 2, "stripe": 1},
    "neighborhood": {"heads": 2, "kernel": 3, "relative_bias": True},
    "linformer": {"heads": 2, "tokens": 12, "rank": 3},
    "topk_region": {"heads": 2, "regions": 2, "topk": 2, "lepe": 3},
    "soft_topk_region": {"heads": 2, "regions": 2, "topk": 2, "router": "linear"},
    "padded_topk_region": {"heads": 2, "regions": 2, "topk": 2, "qk_dim": 6},
    "mask_predictor": {"heads": 2, "tokens": 12, "keep": 0.5},
    "learned_query": {"heads": 2, "kernel": 3},
    "learned_upsample": {"heads": 2, "kernel": 3, "scale": 1},
    "random_window": {"heads": 2, "window": 5},
    "pooled_global": {"heads": 2, "pool": 2},
    "conv": {"heads": 2},
}


def small_groups(name):
    return [{"kind": name, **SMALL[name]}, {"kind": "conv", "heads": 1, "pointwise": False}]


@pytest.fixture(scope="session")
def small_mix():
    """small_mix(name, seed=) -> HeadMix(12) of that primitive's heads and one of convolution, with normal weights."""

    def make(name, *, seed=0, **extra):
        mix = HeadMix(12, small_groups(name), **extra)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in mix.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return mix.eval()

    return make


@pytest.fixture(scope="session", params=sorted(PRIMITIVES))
def primitive(request):
    """The name of every registered primitive in turn."""
    return request.param


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
