"""Mixes that fill their map up with zeros, and mixes without an output projection."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from attnkit import Block, Conv, Dense, Grid, HeadMix, Mix, TopKRegion
from attnkit.errors import ConfigError
from attnkit.testing import random_tensor

GROUPS = [TopKRegion(2, 2, 2, lepe=3), Conv(1), Dense(1)]


def rows(*shape, seed=0, grad=False):
    return random_tensor(*shape, seed=seed, dtype=torch.float32, grad=grad)


@pytest.mark.parametrize("sizes", [(5, 6), (4, 4), (1, 3), (7, 9)])
@pytest.mark.parametrize("multiple", [1, 4, 7])
def test_a_padded_mix_takes_zeros_for_tokens(random_mix, sizes, multiple):
    mix = random_mix(GROUPS, pad_multiple=multiple)
    plain = random_mix(GROUPS)
    plain.load_state_dict(mix.state_dict())
    x = rows(2, *sizes, mix.dim)
    more = [-size % multiple for size in sizes]
    right = plain(F.pad(x, (0, 0, 0, more[1], 0, more[0])))[:, : sizes[0], : sizes[1]]
    torch.testing.assert_close(mix(x), right)
    if not any(more):
        assert torch.equal(mix(x), plain(x))
    else:
        assert (mix(x) - plain(x)).abs().max() > 1e-3


def test_prefix_tokens_and_masks(random_mix):
    grid, larger = Grid(3, 5, prefix=2), Grid(4, 8, prefix=2)
    mix = random_mix(GROUPS, pad_multiple=4)
    plain = random_mix(GROUPS)
    plain.load_state_dict(mix.state_dict())
    x, mask = rows(2, 17, mix.dim), rows(2, 17, seed=5) < 0.6
    image = F.pad(x[:, 2:].unflatten(1, (3, 5)), (0, 0, 0, 3, 0, 1)).flatten(1, 2)
    seen = F.pad(mask[:, 2:].unflatten(1, (3, 5)), (0, 3, 0, 1), value=True).flatten(1, 2)
    right = plain(torch.cat([x[:, :2], image], 1), larger, token_mask=torch.cat([mask[:, :2], seen], 1))
    kept = right[:, 2:].unflatten(1, (4, 8))[:, :3, :5].flatten(1, 2)
    found = mix(x, grid, token_mask=mask)
    torch.testing.assert_close(found[mask], torch.cat([right[:, :2], kept], 1)[mask])
    assert mix.run(x, grid).grid == grid


def test_sequences_and_videos(random_mix):
    mix = random_mix([Dense(2)], pad_multiple=3)
    assert mix(rows(1, 7, mix.dim), Grid(7)).shape == (1, 7, mix.dim)
    assert mix(rows(1, 2, 3, 4, mix.dim)).shape == (1, 2, 3, 4, mix.dim)


def test_a_mix_without_a_projection(random_mix):
    mix = random_mix(GROUPS, projection="none")
    with_one = random_mix(GROUPS)
    assert set(with_one.state_dict()) - set(mix.state_dict()) == {"proj.weight", "proj.bias"}
    with_one.load_state_dict(mix.state_dict(), strict=False)
    with torch.no_grad():
        with_one.proj.weight.copy_(torch.eye(mix.dim))
        with_one.proj.bias.zero_()
    x = rows(2, 4, 6, mix.dim)
    torch.testing.assert_close(mix(x), with_one(x))
    assert copy.deepcopy(mix)(x).equal(mix(x))


def test_inside_a_block_and_as_data():
    mix = Mix((TopKRegion(2, 3, 2),), projection="none", pad_multiple=3, dim=8)
    assert Mix.from_dict(mix.to_dict()) == mix
    block = Block(8, mix).eval()
    assert block(rows(1, 4, 5, 8)).shape == (1, 4, 5, 8)
    with pytest.raises(ValueError, match="convert one of them"):
        block(rows(1, 4, 5, 8).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projection": "nonee"}, r"projection must be one of 'linear', 'none', but got 'nonee'"),
        ({"projection": "none", "out_dim": 6}, "projection='none' leaves the heads' 8 channels, but out_dim=6"),
        ({"pad_multiple": 0}, "pad_multiple=0: must be >= 1"),
        ({"pad_multiple": 2.0}, "pad_multiple must be an integer or None, but got 2.0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HeadMix(8, [Dense(2)], **arguments)


def test_a_stride_cannot_be_cut_back():
    for make in (
        lambda **more: HeadMix(8, [Conv(2, stride=2)], **more),
        lambda **more: Mix((Conv(2, stride=2),), **more),
    ):
        with pytest.raises(ConfigError, match=r"pad_multiple=4.*goes with groups that keep the map, not a stride of 2"):
            make(pad_multiple=4)
