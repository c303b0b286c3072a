"""Inputs that no mix or block can take, beyond wrong shapes: wrong types, grids of other axes, draws that are none."""

from __future__ import annotations

import pytest
import torch

from attnkit import Block, Conv, CrossShaped, Dense, Grid, HeadMix, MaskPredictor, RandomWindow


@pytest.fixture(params=["mix", "block"])
def layer(request):
    """Both layers take the same tokens and refuse the same ones."""
    groups = [Conv(1), Dense(2)]
    return HeadMix(12, groups) if request.param == "mix" else Block(12, groups)


@pytest.mark.parametrize("wrong", [0, -12, 12.0, True, "12", (12,)])
def test_widths(wrong, refused):
    refused(lambda: HeadMix(wrong, [Dense(3)]), "dim", repr(wrong))
    refused(lambda: HeadMix(12, [Dense(3)], head_dim=wrong), "head_dim", repr(wrong))
    refused(lambda: HeadMix(12, [Dense(3)], out_dim=wrong), "out_dim", repr(wrong))
    refused(lambda: Block(wrong, [Dense(3)]), "dim", repr(wrong))


@pytest.mark.parametrize("wrong", [2**31, 10**30])
def test_widths_that_nobody_can_mean(wrong, refused):
    refused(lambda: HeadMix(wrong, [Dense(1)]), "dim", str(wrong))
    refused(lambda: HeadMix(12, [Dense(3)], out_dim=wrong), "out_dim", str(wrong))
    refused(lambda: Block(12, [Dense(3)], mlp_ratio=float(wrong)), "hidden units or more; lower mlp_ratio")


@pytest.mark.parametrize("wrong", [-1, 1.5, "1", None, True, [1], torch.ones(2)])
def test_layers_and_biases_that_are_none(wrong, refused):
    refused(lambda: HeadMix(12, [Dense(3)], layer=wrong), "HeadMix(layer=...) is the number of a layer")
    if wrong is not True:
        refused(lambda: HeadMix(12, [Dense(3)], qkv_bias=wrong), "HeadMix(qkv_bias=...) must be True or False")
        refused(lambda: HeadMix(12, [Dense(3)], proj_bias=wrong), "HeadMix(proj_bias=...) must be True or False")


def test_no_width_at_all(refused):
    refused(lambda: HeadMix(None, [Dense(3)]), "HeadMix(dim=...)", "None")
    refused(lambda: HeadMix(12, None), "must be a list of options", "None")


def test_groups_of_one_kind_do_not_hide_each_others_strides(refused):
    refused(lambda: HeadMix(12, [Conv(1, stride=2), Conv(2, stride=1)]), "all groups need one stride", "2", "1")


@pytest.mark.parametrize("wrong", [12, "3x4", [3, 4]])
def test_a_grid_that_is_none(wrong, layer, refused):
    refused(lambda: layer(torch.randn(2, 12, 12), wrong), "Grid", repr(wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.complex64])
def test_dtypes(dtype, layer, refused):
    x = torch.ones(1, 3, 4, 12).to(dtype)
    refused(lambda: layer(x), str(dtype), "torch.float32")
    if not dtype.is_floating_point:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            refused(lambda: layer(x), str(dtype))


def test_grids_that_a_primitive_cannot_take(refused):
    for groups in ([Conv(2)], [CrossShaped(2, 1)], [Dense(2, lepe=3)]):
        refused(lambda groups=groups: HeadMix(4, groups)(torch.randn(1, 6, 4), Grid(6)), "height and width", "Grid(6)")
    predictor = HeadMix(4, [MaskPredictor(2, 6, 0.5, prefix=1)])
    refused(lambda: predictor(torch.randn(1, 6, 4), Grid(2, 3)), "rows for 1 prefix tokens", "prefix=0")


@pytest.mark.parametrize("make", [HeadMix, Block])
@pytest.mark.parametrize("draw", [3, 1.0, "0", torch.zeros(2, dtype=torch.int64), torch.zeros(())])
def test_draws(make, draw, refused):
    layer = make(4, [RandomWindow(2, 2)])
    refused(lambda: layer(torch.randn(1, 2, 3, 4), draw=draw), "draw", "next_draw")
