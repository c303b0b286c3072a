"""Block: norm, mix, residual, norm, MLP, residual, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import attnkit
from attnkit import Block, Conv, Dense, Grid, LearnedQuery, LearnedUpsample, Mix, RandomWindow
from attnkit.blocks import BlockConfig, DropPath
from attnkit.testing import random_tensor, randomize_parameters
from attnkit.testing.strategies import grids, seeds

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def on_image(x, grid, conv):
    """A depthwise convolution of the image tokens; prefix tokens give None."""
    image = x[:, grid.prefix :].transpose(1, 2).unflatten(2, grid.sizes)
    return (
        F.conv2d(image, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=image.shape[1]).flatten(2).mT
    )


def mlp(block, x, grid):
    hidden = F.linear(x, block.mlp.fc1.weight, block.mlp.fc1.bias)
    if block.config.mlp_conv:
        hidden = torch.cat([hidden[:, : grid.prefix], on_image(hidden, grid, block.mlp.conv)], dim=1)
    return F.linear(ACTIVATIONS[block.config.activation](hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)


def norm(x, layer, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


@given(
    grid=grids(max_height=4, max_width=5),
    seed=seeds(),
    order=st.sampled_from(["pre", "post"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layer_scale=st.sampled_from([None, 0.3]),
    residual_scale=st.sampled_from([1.0, 2.0]),
    convs=st.tuples(st.sampled_from([0, 3]), st.sampled_from([0, 3])),
)
def test_a_block_is_what_it_says(grid, seed, order, activation, layer_scale, residual_scale, convs):
    block = Block(
        6,
        [Dense(1), Conv(1)],
        2.5,
        norm=order,
        norm_eps=1e-3,
        activation=activation,
        layer_scale=layer_scale,
        residual_scale=residual_scale,
        position_conv=convs[0],
        mlp_conv=convs[1],
    )
    block = randomize_parameters(block.double(), seed=seed)
    assert block.mlp.fc1.out_features == 15

    def branch(one, scale):
        return (one if layer_scale is None else one * scale) / residual_scale

    x = random_tensor(2, grid.tokens, 6, seed=seed)
    y = x
    if convs[0]:
        y = torch.cat([y[:, : grid.prefix], y[:, grid.prefix :] + on_image(y, grid, block.position_conv)], dim=1)
    if order == "pre":
        y = y + branch(block.mix(norm(y, block.norm1, 1e-3), grid), block.scale1)
        y = y + branch(mlp(block, norm(y, block.norm2, 1e-3), grid), block.scale2)
    else:
        y = norm(y + branch(block.mix(y, grid), block.scale1), block.norm1, 1e-3)
        y = norm(y + branch(mlp(block, y, grid), block.scale2), block.norm2, 1e-3)
    torch.testing.assert_close(block(x, grid), y, rtol=1e-9, atol=1e-9)


@given(
    grid=grids(max_height=5, max_width=5), seed=seeds(), stride=st.integers(1, 3), out_dim=st.sampled_from([None, 9])
)
def test_strides_and_other_widths_change_the_shortcut(grid, seed, stride, out_dim):
    mix = Mix((LearnedQuery(3, 3, stride=stride),), out_dim=out_dim)
    block = randomize_parameters(Block(6, mix, 2.0).double(), seed=seed)
    x = random_tensor(2, grid.tokens, 6, seed=seed)
    places = [
        grid.prefix + down * grid.width + right
        for down in range(0, grid.height, stride)
        for right in range(0, grid.width, stride)
    ]
    rows = x[:, [*range(grid.prefix), *places]]
    if stride > 1 or out_dim:
        rows = rows @ block.shortcut.weight.T
    else:
        assert block.shortcut is None
    small = grid.strided(stride)
    y = rows + block.mix(norm(x, block.norm1, 1e-6), grid)
    y = y + mlp(block, norm(y, block.norm2, 1e-6), small)
    found = block.run(x, grid)
    assert found.grid == small
    torch.testing.assert_close(found.x, y, rtol=1e-9, atol=1e-9)


@given(grid=grids(max_height=4, max_width=5), seed=seeds(), scale=st.integers(1, 3), masked=st.booleans())
def test_a_finer_map_gets_each_token_repeated_as_its_shortcut(grid, seed, scale, masked):
    block = randomize_parameters(Block(6, [LearnedUpsample(2, 3, scale=scale)], 2.0, mlp_conv=3).double(), seed=seed)
    x = random_tensor(2, grid.tokens, 6, seed=seed)
    kept = random_tensor(2, grid.tokens, seed=seed + 1) < 0.7 if masked else None
    places = [
        grid.prefix + down // scale * grid.width + right // scale
        for down in range(grid.height * scale)
        for right in range(grid.width * scale)
    ]
    rows = [*range(grid.prefix), *places]
    shortcut = x[:, rows] if scale == 1 else x[:, rows] @ block.shortcut.weight.T
    fine = grid.refined(scale)
    y = shortcut + block.mix(norm(x, block.norm1, 1e-6), grid, token_mask=kept)
    inner = norm(y, block.norm2, 1e-6)
    y = y + block.mlp(inner, fine, None if kept is None else kept[:, rows])
    found = block.run(x, grid, token_mask=kept)
    assert found.grid == fine
    torch.testing.assert_close(found.x, y, rtol=1e-9, atol=1e-9)


def test_maps_and_tokens_are_the_same():
    block = Block(8, [Dense(2)])
    x = random_tensor(2, 3, 4, 8, seed=0, dtype=torch.float32)
    assert torch.equal(block(x).flatten(1, 2), block(x.flatten(1, 2), Grid(3, 4)))


@pytest.mark.parametrize("poison", [5.0, torch.nan])
@pytest.mark.parametrize("options", [{}, {"position_conv": 3}, {"mlp_conv": 3}, {"norm": "post", "mlp_conv": 3}])
@pytest.mark.parametrize("stride", [1, 2])
def test_masked_tokens_never_matter(poison, options, stride):
    if stride == 2 and options.get("norm") == "post":
        options = {"mlp_conv": 5}
    grid = Grid(4, 5, prefix=1)
    block = randomize_parameters(Block(6, [LearnedQuery(2, 3, stride=stride)], 2.0, **options).double(), seed=1)
    kept = torch.rand(2, 21, generator=torch.Generator().manual_seed(0)) < 0.7
    x = random_tensor(2, 21, 6, seed=0)
    clean, spoiled = (block(one, grid, token_mask=kept) for one in (x, x.masked_fill(~kept[..., None], poison)))
    # Outputs that stand on a masked token carry that token in their shortcut.
    places = [*range(1), *(1 + down * 5 + right for down in range(0, 4, stride) for right in range(0, 5, stride))]
    alive = kept[:, places]
    torch.testing.assert_close(spoiled[alive], clean[alive], rtol=1e-10, atol=1e-10)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    dropped = drop.train()(x)
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped, kept[:, None, None] * torch.full_like(x, 1 / 0.75))
    assert abs(float(kept.float().mean()) - 0.75) < 0.04
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_drop_path_drops_both_branches():
    block = randomize_parameters(Block(6, [Dense(2)], 2.0, drop_path=0.5), seed=0).train()
    x = random_tensor(400, 4, 6, seed=0, dtype=torch.float32)
    unchanged = (block(x, Grid(2, 2)) == x).flatten(1).all(1).float().mean()
    assert 0.15 < float(unchanged) < 0.35


def test_a_block_as_data():
    config = {
        "kind": "block",
        "dim": 8,
        "mix": {"kind": "mix", "groups": [{"kind": "dense", "heads": 2}]},
        "mlp_ratio": 2.0,
    }
    block = attnkit.build(config, drop_path=0.1, **{"mix.groups[0].heads": 4})
    assert isinstance(block, Block)
    assert block.mix.options == (Dense(4),)
    assert block.drop_path.rate == 0.1
    assert BlockConfig.from_dict(block.config.to_dict()) == block.config
    again = attnkit.build(block.config.to_dict())
    again.load_state_dict(block.state_dict())
    x = random_tensor(1, 4, 8, seed=0, dtype=torch.float32)
    assert torch.equal(again.eval()(x, Grid(2, 2)), block.eval()(x, Grid(2, 2)))


def test_the_layer_reaches_the_random_windows():
    x = random_tensor(1, 24, 8, seed=0, dtype=torch.float32)
    found = []
    for layer in (0, 1, 0):
        block = randomize_parameters(Block(8, [RandomWindow(2, 5)], layer=layer).eval(), seed=0)
        found.append(block(x, Grid(4, 6)))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
