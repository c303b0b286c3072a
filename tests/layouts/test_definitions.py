"""Each layout's mask against its docstring, token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid
from attnkit.layouts import Blocks, Dense, Stencil, TokenMask, TokenSets
from attnkit.testing.strategies import grids, seeds


def places(grid):
    return list(itertools.product(*(range(size) for size in grid.sizes)))


def mask_from(queries, keys, prefix, sees):
    """Boolean (Nq, Nk) from a rule on places; prefix tokens see all and are seen by all."""
    rows = [[True] * (prefix + len(keys)) for _ in range(prefix)]
    rows += [[True] * prefix + [sees(query, key) for key in keys] for query in queries]
    return torch.tensor(rows, dtype=torch.bool)


def same(layout, mask, batch=1, heads=1):
    found = layout.to_mask()
    assert found.dtype == torch.bool
    assert (layout.num_queries, layout.num_keys) == tuple(mask.shape[-2:])
    return torch.equal(found.expand(batch, heads, *mask.shape[-2:]), mask.expand(batch, heads, -1, -1))


@given(queries=st.integers(0, 9), keys=st.integers(0, 9))
def test_dense_sees_everything(queries, keys):
    assert same(Dense(queries, keys), torch.ones(queries, keys, dtype=torch.bool))
    assert Dense(queries).num_keys == queries


def clamped(query, kernel, dilation, size):
    """The run of `kernel` neighbours of one remainder whose middle lies nearest to the query."""
    family = [key for key in range(size) if key % dilation == query % dilation]
    runs = [family[start : start + kernel] for start in range(max(len(family) - kernel, 0) + 1)]
    place = family.index(query)
    return min(runs, key=lambda run: abs(family.index(run[0]) + kernel // 2 - place))


@given(
    grid=grids(max_height=6, max_width=7),
    halves=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    border=st.sampled_from(["mask", "clamp"]),
)
def test_stencil_sees_a_window(grid, halves, stride, dilation, border):
    kernel = tuple(2 * half + 1 for half in halves)
    queries = [place for place in places(grid) if all(at % step == 0 for at, step in zip(place, stride, strict=True))]

    def seen(query, axis):
        if border == "clamp":
            return clamped(query, kernel[axis], dilation[axis], grid.sizes[axis])
        return [query + dilation[axis] * tap for tap in range(-(kernel[axis] // 2), kernel[axis] // 2 + 1)]

    expected = mask_from(
        queries, places(grid), grid.prefix, lambda q, k: all(k[axis] in seen(q[axis], axis) for axis in range(2))
    )
    assert same(Stencil(grid, kernel, stride=stride, dilation=dilation, border=border), expected)


@given(grid=grids(), half=st.integers(0, 4))
def test_clamped_stencil_always_sees_a_full_window(grid, half):
    kernel = 2 * half + 1
    full = min(kernel, grid.height) * min(kernel, grid.width)
    seen = Stencil(grid, kernel, border="clamp").visible()[0, 0, grid.prefix :]
    assert (seen == full + grid.prefix).all()


@given(
    grid=grids(),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shift=st.none() | st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_windows_cut_every_axis(grid, window, shift):
    def run(place, axis):
        length = min(window[axis], grid.sizes[axis])
        moved = 0 if shift is None or length == grid.sizes[axis] else shift[axis]
        return (place[axis] - moved) // length

    expected = mask_from(
        places(grid), places(grid), grid.prefix, lambda q, k: all(run(q, axis) == run(k, axis) for axis in range(2))
    )
    assert same(Blocks.windows(grid, window, shift=shift), expected)


@given(grid=grids(), window=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_dilated_windows_spread_over_every_axis(grid, window):
    steps = [-(-size // min(length, size)) for size, length in zip(grid.sizes, window, strict=True)]
    expected = mask_from(
        places(grid),
        places(grid),
        grid.prefix,
        lambda q, k: all((a - b) % step == 0 for a, b, step in zip(q, k, steps, strict=True)),
    )
    layout = Blocks.windows(grid, window, dilated=True)
    assert same(layout, expected)
    longest = [min(length, size) for size, length in zip(grid.sizes, window, strict=True)]
    assert layout.order.token.shape[3] <= longest[0] * longest[1]


@given(
    grid=grids(),
    seed=seeds(),
    regions=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    lead=st.sampled_from([(), (2,), (2, 3), (1, 3), (2, 1)]),
)
def test_regions_see_the_regions_they_are_routed_to(grid, seed, regions, lead):
    generator = torch.Generator().manual_seed(seed)
    count = regions[0] * regions[1]
    index = torch.randint(-1, count, (*lead, count, 1 + seed % (count + 1)), generator=generator)
    lengths = [-(-size // number) for size, number in zip(grid.sizes, regions, strict=True)]
    full = index.view(1, 1, *index.shape) if not lead else index[:, None] if len(lead) == 1 else index

    def region(place):
        return place[0] // lengths[0] * regions[1] + place[1] // lengths[1]

    for batch, head in itertools.product(range(full.shape[0]), range(full.shape[1])):
        routes = full[batch, head].tolist()
        expected = mask_from(
            places(grid), places(grid), grid.prefix, lambda q, k, routes=routes: region(k) in routes[region(q)]
        )
        assert torch.equal(Blocks.from_regions(grid, regions, index).to_mask()[batch, head], expected)


@given(
    grid=grids(), seed=seeds(), window=st.integers(1, 12), lead=st.sampled_from([(), (1, 1), (2, 1), (1, 3), (2, 3)])
)
def test_permuted_windows_hold_neighbours_of_the_permuted_row(grid, seed, window, lead):
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.rand(*lead, grid.image_tokens, generator=generator).argsort(-1)
    layout = Blocks.permuted(permutation, window, prefix=grid.prefix)
    shape = lead or (1, 1)
    for batch, head in itertools.product(range(shape[0]), range(shape[1])):
        row = permutation.view(*shape, -1)[batch, head].tolist()
        number = {token: place // window for place, token in enumerate(row)}
        tokens = range(grid.image_tokens)
        expected = mask_from(tokens, tokens, grid.prefix, lambda q, k, number=number: number[q] == number[k])
        assert torch.equal(layout.to_mask()[batch, head], expected)


@given(
    grid=grids(max_height=4, max_width=4),
    seed=seeds(),
    lead=st.sampled_from([(), (3,), (2, 3), (1, 1), (2, 1)]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_token_sets_see_what_is_listed(grid, seed, lead, dtype):
    generator = torch.Generator().manual_seed(seed)
    keys, listed = grid.prefix + seed % 7 + 1, seed % 5
    index = torch.randint(-1, keys, (*lead, grid.image_tokens, listed), generator=generator)
    layout = TokenSets(index.to(dtype), keys, queries_all=grid.prefix, keys_all=min(grid.prefix, keys))
    full = index.reshape(*(1,) * (2 - len(lead)), *index.shape)
    for batch, head in itertools.product(range(full.shape[0]), range(full.shape[1])):
        rows = full[batch, head].tolist()
        expected = mask_from(
            range(grid.image_tokens), range(grid.prefix, keys), grid.prefix, lambda q, k, rows=rows: k in rows[q]
        )
        assert torch.equal(layout.to_mask()[batch, head], expected)


@pytest.mark.parametrize("lead", [(), (3,), (1, 3), (2, 1), (2, 3)])
def test_token_mask_is_its_mask(lead):
    mask = torch.rand(*lead, 4, 5) < 0.5
    layout = TokenMask(mask)
    full = mask.reshape(*(1,) * (2 - len(lead)), *mask.shape)
    assert same(layout, full, *full.shape[:2])


@pytest.mark.parametrize("sizes", [(11,), (2, 3, 4), (1, 1, 1)])
def test_layouts_take_any_number_of_axes(sizes):
    grid = Grid(*sizes, prefix=2)

    def near(query, key):
        return all(abs(a - b) <= 1 for a, b in zip(query, key, strict=True))

    def together(query, key):
        return all(a // 2 == b // 2 for a, b in zip(query, key, strict=True))

    assert same(Stencil(grid, 3), mask_from(places(grid), places(grid), 2, near))
    # A window over a whole axis of one token is that token, and halves agree with it.
    assert same(Blocks.windows(grid, 2), mask_from(places(grid), places(grid), 2, together))
    regions = [-(-size // 2) for size in sizes]
    count = torch.tensor(regions).prod()
    own = torch.arange(int(count))[None, :, None]
    assert same(Blocks.from_regions(grid, tuple(regions), own), mask_from(places(grid), places(grid), 2, together))
