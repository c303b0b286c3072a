"""Block: options there and back, and what drop path and layer scale leave unchanged."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Block, Conv, Dense, Grid, LearnedQuery, build
from attnkit.blocks import BlockConfig
from attnkit.testing import random_tensor

STYLES = st.fixed_dictionaries(
    {},
    optional={
        "mlp_ratio": st.floats(0.5, 4.0) | st.integers(1, 4),
        "norm": st.sampled_from(["pre", "post"]),
        "norm_eps": st.floats(1e-8, 1e-2),
        "activation": st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
        "drop_path": st.floats(0.0, 0.9),
        "layer_scale": st.none() | st.floats(0.0, 1.0),
        "residual_scale": st.floats(0.5, 4.0),
        "position_conv": st.sampled_from([0, 1, 3, 5]),
        "mlp_conv": st.sampled_from([0, 3]),
    },
)


def tokens(*shape, seed=0):
    return random_tensor(*shape, seed=seed, dtype=torch.float32)


@given(style=STYLES, full=st.booleans())
def test_any_style_survives_as_a_plain_dict(style, full):
    block = Block(6, [Dense(1), Conv(1)], **style)
    plain = json.loads(json.dumps(block.config.to_dict(full=full)))
    assert BlockConfig.from_dict(plain) == block.config
    for name, value in style.items():
        assert getattr(block.config, name) == value
    again = build(plain)
    again.load_state_dict(block.state_dict())
    x = tokens(2, 13, 6)
    grid = Grid(3, 4, prefix=1)
    assert torch.equal(again.eval()(x, grid), block.eval()(x, grid))


@given(style=STYLES, rate=st.floats(0.05, 0.9))
def test_in_evaluation_drop_path_is_nothing(style, rate):
    dropping = Block(6, [Dense(2)], **{**style, "drop_path": rate}).eval()
    plain = Block(6, [Dense(2)], **{**style, "drop_path": 0.0}).eval()
    plain.load_state_dict(dropping.state_dict())
    x = tokens(2, 12, 6)
    assert torch.equal(dropping(x, Grid(3, 4)), plain(x, Grid(3, 4)))


def test_a_layer_scale_of_zero_is_the_identity():
    block = Block(6, [Dense(2)], layer_scale=0.0)
    x = tokens(2, 12, 6)
    assert torch.equal(block(x, Grid(3, 4)), x)
    block(x, Grid(3, 4)).square().sum().backward()
    assert block.scale1.grad.abs().min() > 0 and block.scale2.grad.abs().min() > 0


def test_the_shortcut_of_a_stride_is_never_alone():
    """Where the mix changes the grid, its branch is not dropped: no sample may be a plain subsampling."""
    torch.manual_seed(1)
    block = Block(6, [LearnedQuery(2, 3, stride=2)], drop_path=0.9).train()
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
    x = tokens(64, 4, 4, 6)
    bare = block.shortcut(x[:, ::2, ::2])
    assert ((block(x) - bare).flatten(1).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("name", ["position_conv", "mlp_conv"])
def test_convolutions_need_two_axes(name, refused):
    block = Block(6, [Dense(2)], **{name: 3})
    refused(lambda: block(tokens(1, 5, 6), Grid(5)), "height and width", "Grid(5)")
