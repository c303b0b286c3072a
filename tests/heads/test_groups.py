"""Groups of a mix: their order, columns, widths and strides, and grids of any number of axes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Conv, Dense, Grid, HeadMix, LearnedQuery, Linformer, PooledGlobal, RandomWindow, Window
from attnkit.testing import random_tensor

ANY_GRID = ["dense", "window", "topk_region", "mask_predictor", "random_window", "pooled_global", "linformer"]
SMALL_SOFTMAX = [Dense(1), RandomWindow(1, 3), PooledGlobal(1, 2)]


def tokens(*shape, seed=0):
    return random_tensor(*shape, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("kind", ANY_GRID)
def test_videos_and_sequences(kind):
    more = {"window": {"window": 2}, "topk_region": {"regions": 2, "topk": 1}, "random_window": {"window": 5}}
    more |= {"mask_predictor": {"tokens": 24, "keep": 0.5}, "pooled_global": {"pool": 2}}
    more |= {"linformer": {"tokens": 24, "rank": 3}}
    mix = HeadMix(8, [{"kind": kind, "heads": 2, **more.get(kind, {})}]).eval()
    video = tokens(2, 2, 3, 4, 8)
    out = mix(video)
    assert out.shape == video.shape
    assert torch.equal(out.flatten(1, 3), mix(video.flatten(1, 3), Grid(2, 3, 4)))
    for grid in (Grid(24), Grid(196), Grid(5, prefix=2)):
        x = tokens(2, grid.tokens, 8)
        found = mix(x, grid)
        assert found.shape == x.shape and found.isfinite().all()
    many = mix(tokens(1, 2, 2, 1, 3, 8))
    assert many.shape == (1, 2, 2, 1, 3, 8)


def identity(mix):
    """Makes the output projection the identity, so that the channels of the groups can be told apart."""
    with torch.no_grad():
        mix.proj.weight.copy_(torch.eye(mix.out_dim))
        mix.proj.bias.zero_()
    return mix


def test_groups_keep_their_order():
    groups = [Conv(2), RandomWindow(1, 4), PooledGlobal(1, 2), Dense(2)]
    mix = identity(HeadMix(12, groups).eval())
    x = tokens(2, 3, 4, 12)
    out = mix(x)
    start = 0
    for at, group in enumerate(groups):
        stop = start + 2 * group.heads
        changed = copy.deepcopy(mix)
        columns = [one.q + one.k + one.v for one in mix.columns]
        with torch.no_grad():
            changed.qkv.weight[sum(columns[:at]) : sum(columns[: at + 1])] *= -2.0
        moved = (changed(x) != out).flatten(0, 2).any(0)
        assert moved[start:stop].all() and moved.sum() == group.heads * 2, group
        start = stop


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 2, 1]])
def test_permuted_groups_permute_their_channels(order):
    groups = [Conv(2), RandomWindow(3, 4), Dense(1)]
    mix = identity(HeadMix(12, groups).eval())
    other = identity(HeadMix(12, [groups[at] for at in order]).eval())
    ends = [sum(one.heads * 2 for one in groups[:at]) for at in range(4)]
    columns = [sum(one.q + one.k + one.v for one in mix.columns[:at]) for at in range(4)]
    with torch.no_grad():
        for to, at in zip((other.qkv.weight, other.qkv.bias), (mix.qkv.weight, mix.qkv.bias), strict=True):
            to.copy_(torch.cat([at[columns[one] : columns[one + 1]] for one in order]))
    for to, at in enumerate(order):
        other.groups[to].load_state_dict(mix.groups[at].state_dict())
        if groups[at].kind == "random_window":
            other.groups[to].place = mix.groups[at].place
    x = tokens(2, 3, 3, 12)
    parts = mix(x)
    expected = torch.cat([parts[..., ends[at] : ends[at + 1]] for at in order], dim=-1)
    torch.testing.assert_close(other(x), expected)


# Columns of each group for 12 channels in heads of 2: q, k and v; only v; and q alone for pooled keys.
@pytest.mark.parametrize(
    "groups, columns",
    [
        ([Dense(6)], 36),
        ([Conv(6)], 12),
        ([LearnedQuery(6, 3)], 12),
        ([PooledGlobal(6, 2)], 12),
        ([PooledGlobal(6, 2, lepe=3)], 24),
        ([Conv(2), RandomWindow(2, 4), PooledGlobal(2, 2)], 4 + 12 + 4),
        ([Linformer(3, 9, 2), Window(3, 2)], 18 + 18),
    ],
)
def test_exactly_the_columns_that_are_needed(groups, columns):
    mix = HeadMix(12, groups)
    assert mix.qkv.weight.shape == (columns, 12) and mix.qkv.bias.shape == (columns,)
    assert mix.proj.weight.shape == (12, 12)
    assert sum(one.q + one.k + one.v for one in mix.columns) == columns


@given(
    heads=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    head_dim=st.integers(1, 5),
    out_dim=st.integers(1, 9),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_widths_and_biases(heads, head_dim, out_dim, biases):
    groups = [replace(one, heads=count) for one, count in zip(SMALL_SOFTMAX, heads, strict=True)]
    mix = HeadMix(7, groups, head_dim=head_dim, out_dim=out_dim, qkv_bias=biases[0], proj_bias=biases[1]).eval()
    assert mix(tokens(2, 3, 2, 7)).shape == (2, 3, 2, out_dim)
    assert (mix.qkv.bias is not None, mix.proj.bias is not None) == biases
    assert mix.qkv.weight.shape == (head_dim * (3 * heads[0] + 3 * heads[1] + heads[2]), 7)
    assert mix.proj.weight.shape == (out_dim, head_dim * sum(heads))


@pytest.mark.parametrize("stride, sizes", [(1, (5, 4)), (2, (3, 2)), (3, (2, 2))])
@pytest.mark.parametrize("prefix", [0, 2])
def test_strides_shrink_the_grid(stride, sizes, prefix):
    if prefix:
        groups, grid = [Conv(2, stride=stride)], Grid(5, 4, prefix=prefix)
    else:
        groups, grid = [Conv(2, stride=stride), LearnedQuery(1, 3, stride=stride)], Grid(5, 4)
    mix = HeadMix(6, groups, head_dim=2).eval()
    found = mix.run(tokens(2, grid.tokens, 6), grid)
    assert found.grid == Grid(*sizes, prefix=prefix) and found.x.shape == (2, found.grid.tokens, 6)
    assert mix(tokens(2, 5, 4, 6)).shape == (2, *sizes, 6)
