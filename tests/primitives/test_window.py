"""window, cross_shaped and neighborhood against loops over their keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import CrossShaped, Dense, Grid, Neighborhood, Window
from attnkit.errors import ShapeError
from attnkit.testing.strategies import grids, seeds

SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def runs(size, window, partition):
    """The runs into which one axis falls."""
    window = min(window, size)
    if partition == "grid":
        steps = -(-size // window)
        return [list(range(start, size, steps)) for start in range(steps)]
    first = 0
    if partition == "shifted" and window < size:
        first = max(window // 2, 1) - window
    cut = [[at for at in range(start, start + window) if 0 <= at < size] for start in range(first, size, window)]
    return [run for run in cut if run]


def window_of(place, cuts):
    rows, columns = (next(run for run in cut if at in run) for at, cut in zip(place, cuts, strict=True))
    return list(itertools.product(rows, columns))


@pytest.mark.parametrize("partition", ["plain", "shifted", "grid"])
@given(grid=grids(max_height=5, max_width=6), window=SIDES, heads=st.integers(1, 3), seed=seeds())
def test_window(partition, random_mix, by_hand, agree, grid, window, heads, seed):
    mix = random_mix(Window(heads, window, partition=partition), seed=seed)
    hand = by_hand(mix, grid)
    cuts = [runs(size, side, partition) for size, side in zip(grid.sizes, window, strict=True)]
    lists = hand.lists(lambda place: window_of(place, cuts))
    agree(mix, grid, lambda x: hand.joined(hand.attention(*hand.projected(x), lists)), seed=seed)


@pytest.mark.parametrize("partition", ["plain", "shifted"])
@given(grid=grids(max_height=4, max_width=5, max_prefix=2), window=SIDES, seed=seeds())
def test_window_with_relative_bias(partition, random_mix, by_hand, agree, grid, window, seed):
    mix = random_mix(Window(2, window, partition=partition, relative_bias=True), seed=seed)
    hand = by_hand(mix, grid)
    cuts = [runs(size, side, partition) for size, side in zip(grid.sizes, window, strict=True)]
    lists = hand.lists(lambda place: window_of(place, cuts))
    table = mix.groups[0].relative_bias
    assert table.shape == (2, 2 * window[0] - 1, 2 * window[1] - 1)

    def bias():
        rows = torch.zeros(2, grid.tokens, grid.tokens, dtype=torch.float64)
        pairs = [
            (hand.token(*place), hand.token(*key), key[0] - place[0] + window[0] - 1, key[1] - place[1] + window[1] - 1)
            for place in hand.places
            for key in window_of(place, cuts)
        ]
        queries, keys, down, right = (torch.tensor(one) for one in zip(*pairs, strict=True))
        return rows.index_put((torch.arange(2)[:, None], queries[None], keys[None]), table[:, down, right])

    agree(mix, grid, lambda x: hand.joined(hand.attention(*hand.projected(x), lists, bias=bias())), seed=seed)


@given(grid=grids(max_height=5, max_width=6), side=st.integers(1, 7), seed=seeds())
def test_one_number_stands_for_both_sides(random_mix, grid, side, seed):
    x = torch.randn(1, grid.tokens, 4, dtype=torch.float64)
    for partition in ("plain", "shifted", "grid"):
        square = random_mix(Window(2, side, partition=partition), seed=1)
        pair = random_mix(Window(2, (side, side), partition=partition), seed=1)
        assert torch.equal(square(x, grid), pair(x, grid))


def test_shifted_windows_join_neighbours_that_plain_ones_part(random_mix):
    """On a row of eight, plain windows of four part 3 from 4; shifted ones part 1 from 2 and 5 from 6 instead."""
    grid = Grid(1, 8)
    sees = {}
    for partition in ("plain", "shifted"):
        mix = random_mix(Window(1, 4, partition=partition))
        x = torch.randn(1, 8, 2, dtype=torch.float64, requires_grad=True)
        rows = [torch.autograd.grad(mix(x, grid)[0, at].sum(), x)[0][0].any(-1).tolist() for at in range(8)]
        sees[partition] = [[at for at, seen in enumerate(row) if seen] for row in rows]
    assert sees["plain"] == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4
    assert sees["shifted"] == [[0, 1]] * 2 + [[2, 3, 4, 5]] * 4 + [[6, 7]] * 2


@given(grid=grids(max_height=5, max_width=6), stripe=st.integers(1, 4), half=st.integers(1, 2), seed=seeds())
def test_cross_shaped(random_mix, by_hand, agree, grid, stripe, half, seed):
    mix = random_mix(CrossShaped(2 * half, stripe), seed=seed)
    hand = by_hand(mix, grid)

    def stripes(axis):
        return hand.lists(lambda place: [key for key in hand.places if key[axis] // stripe == place[axis] // stripe])

    def expected(x):
        q, k, v = hand.projected(x)
        outs = [
            hand.attention(q[:, part], k[:, part], v[:, part], stripes(axis))
            for axis, part in enumerate((slice(None, half), slice(half, None)))
        ]
        return hand.joined(torch.cat(outs, dim=1))

    agree(mix, grid, expected, seed=seed)


def nearest(place, size, kernel, dilation):
    """The kernel tokens of one remainder nearest to a place, or as near as the border lets them be."""
    family = list(range(place % dilation, size, dilation))
    inner = family.index(place)
    start = max(0, min(inner - kernel // 2, len(family) - kernel))
    return family[start : start + kernel]


@given(
    grid=grids(max_height=5, max_width=6, max_prefix=2),
    half=st.integers(0, 3),
    dilation=st.integers(1, 3),
    biased=st.booleans(),
    seed=seeds(),
)
def test_neighborhood(random_mix, by_hand, agree, grid, half, dilation, biased, seed):
    kernel = 2 * half + 1
    mix = random_mix(Neighborhood(2, kernel, dilation=dilation, relative_bias=biased), seed=seed)
    hand = by_hand(mix, grid)

    def near(place):
        return list(
            itertools.product(
                *(nearest(at, size, kernel, dilation) for at, size in zip(place, grid.sizes, strict=True))
            )
        )

    def bias():
        if not biased:
            return None
        table = mix.groups[0].relative_bias
        middle = table.shape[1] // 2
        rows = torch.zeros(2, grid.tokens, grid.tokens, dtype=torch.float64)
        pairs = [
            (hand.token(*place), hand.token(*key), key[0] - place[0] + middle, key[1] - place[1] + middle)
            for place in hand.places
            for key in near(place)
        ]
        queries, keys, down, right = (torch.tensor(one) for one in zip(*pairs, strict=True))
        return rows.index_put((torch.arange(2)[:, None], queries[None], keys[None]), table[:, down, right])

    lists = hand.lists(near)
    agree(mix, grid, lambda x: hand.joined(hand.attention(*hand.projected(x), lists, bias=bias())), seed=seed)


@given(
    grid=grids(max_height=4, max_width=5),
    heads=st.integers(1, 3),
    seed=seeds(),
    scale=st.sampled_from(["head", "group", 0.3]),
)
def test_dense(random_mix, by_hand, agree, grid, heads, seed, scale):
    mix = random_mix(Dense(heads, scale=scale), head_dim=3, seed=seed)
    hand = by_hand(mix, grid)
    number = {"head": 3**-0.5, "group": (3 * heads) ** -0.5}.get(scale, scale)
    lists = [list(range(grid.tokens))] * grid.tokens
    agree(mix, grid, lambda x: hand.joined(hand.attention(*hand.projected(x), lists, scale=number)), seed=seed)


@pytest.mark.parametrize("sizes", [(7,), (2, 3, 4)])
def test_what_needs_no_two_axes_takes_any(random_mix, sizes):
    grid = Grid(*sizes, prefix=1)
    x = torch.randn(2, grid.tokens, 4, dtype=torch.float64)
    for options in (Dense(2), Window(2, 2), Neighborhood(2, 3)):
        assert random_mix(options)(x, grid).shape == x.shape
    with pytest.raises(ShapeError, match=r"needs a grid of height and width, but got Grid"):
        random_mix(CrossShaped(2, 1))(x, grid)


@pytest.mark.parametrize(
    "options", [Window(2, (2, 2, 2)), Window(2, (2, 2), relative_bias=True), Neighborhood(2, 3, relative_bias=True)]
)
def test_windows_of_other_axes_than_the_grid_are_refused(random_mix, options):
    grid = Grid(8)
    with pytest.raises(ValueError, match=r"one per axis of Grid\(8\)|per axis of Grid\(8\)") as caught:
        random_mix(options)(torch.zeros(1, 8, 4, dtype=torch.float64), grid)
    assert type(caught.value).__module__ == "attnkit.errors"
