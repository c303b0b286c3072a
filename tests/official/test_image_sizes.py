"""Released models run at sizes at which the authors' code stops or pads."""

from __future__ import annotations

import math

import pytest
import torch

import attnkit
from attnkit_models import export_official, import_official
from attnkit_models.checkpoints.sparsifiner_arguments import Sparsifiner, configuration

SIZES = [(224, 224), (256, 256), (192, 320), (512, 512)]
ISOTROPIC = ["sparsifiner_deit_small", "sparsifiner_lvvit_small"]
NAMES = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw", "qna_vit_tiny"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_which_the_authors_windows_do_not_divide_the_map(name, size):
    model = attnkit.build(name, **{"stages[*].depth": 1, "num_classes": 5}).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ISOTROPIC)
def test_sizes_at_which_the_authors_tables_do_not_fit(name, size):
    model = attnkit.build(name, depth=2, num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("size", [(192, 320), (256, 256)], ids=str)
def test_their_pruned_model_at_other_sizes(size):
    """With their arguments, and what their code does at the size it was made for."""
    ctor = {"embed_dim": 96, "depth": 3, "num_heads": 3, "reduce_n_factor": 6, "num_classes": 5}
    ctor |= {"token_keep_rate_list": [1.0, 0.7, 0.49], "token_pruning_loc_indicator": [False, True, True]}
    model = attnkit.build(configuration(Sparsifiner, ctor)).eval()
    count = size[0] * size[1] // 256
    with torch.no_grad():
        features, left = model.forward_tokens(torch.randn(2, 3, *size))
    assert features.isfinite().all()
    assert left.sum(1).tolist() == [1 + math.ceil(97 / 196 * count - 1e-6)] * 2


@pytest.mark.parametrize(
    "name", ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw"]
)
def test_whole_released_models(name):
    model = import_official(name, export_official(name, attnkit.build(name)))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 192, 320)).isfinite().all()
