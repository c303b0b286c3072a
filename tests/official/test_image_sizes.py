"""Released models run at sizes at which the authors' code stops or pads."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit_models import export_official, import_official

SIZES = [(224, 224), (256, 256), (192, 320), (512, 512)]
NAMES = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw", "qna_vit_tiny"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_which_the_authors_windows_do_not_divide_the_map(name, size):
    model = attnkit.build(name, **{"stages[*].depth": 1, "num_classes": 5}).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw"]
)
def test_whole_released_models(name):
    model = import_official(name, export_official(name, attnkit.build(name)))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 192, 320)).isfinite().all()
