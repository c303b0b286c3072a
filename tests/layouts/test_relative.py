"""RelativeTable: a value per head and offset."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid
from attnkit.layouts import RelativeTable
from attnkit.testing import random_tensor
from attnkit.testing.strategies import grids, seeds


def by_hand(table, grid, stride, fill, head, query, key):
    """The value of one pair of token numbers, from the docstring."""
    if query < grid.prefix or key < grid.prefix:
        return fill
    query_grid = [-(-size // step) for size, step in zip(grid.sizes, stride, strict=True)]
    places = list(itertools.product(*(range(size) for size in query_grid)))
    query_place = places[query - grid.prefix]
    key_place = list(itertools.product(*(range(size) for size in grid.sizes)))[key - grid.prefix]
    offsets = [k - q * step for k, q, step in zip(key_place, query_place, stride, strict=True)]
    spots = [offset + extent // 2 for offset, extent in zip(offsets, table.shape[1:], strict=True)]
    if not all(0 <= spot < extent for spot, extent in zip(spots, table.shape[1:], strict=True)):
        return fill
    return table[(head, *spots)].item()


@given(
    grid=grids(max_height=4, max_width=4, max_prefix=2),
    extents=st.tuples(st.sampled_from([1, 3, 5, 9]), st.sampled_from([1, 3, 7])),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    fill=st.sampled_from([0.0, 1.0]),
    seed=seeds(),
)
def test_values_of_all_pairs(grid, extents, stride, fill, seed):
    table = random_tensor(2, *extents, seed=seed)
    relative = RelativeTable(table, grid, stride, fill)
    queries = grid.strided(stride).tokens
    found = relative.dense(queries)
    assert found.shape == (1, 2, queries, grid.tokens)
    expected = [
        [
            [by_hand(table, grid, stride, fill, head, query, key) for key in range(grid.tokens)]
            for query in range(queries)
        ]
        for head in range(2)
    ]
    assert torch.equal(found[0], torch.tensor(expected, dtype=torch.float64))
    spots = torch.arange(queries)[None, None, :, None], torch.arange(grid.tokens)[None, None, None]
    assert torch.equal(relative.lookup(*spots), found)


@given(
    grid=grids(max_height=4, max_width=4, max_prefix=2),
    seed=seeds(),
    lead=st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2)]),
)
def test_values_of_listed_pairs(grid, seed, lead):
    table = random_tensor(2, 5, 3, seed=seed)
    relative = RelativeTable(table, grid, fill=0.25)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-1, grid.tokens, (*lead, grid.tokens, 4), generator=generator)
    rows = torch.arange(grid.tokens)[None, None, :, None]
    found = relative.lookup(rows, keys).expand(lead[0], 2, -1, -1)
    dense = relative.dense(grid.tokens).expand(lead[0], -1, -1, -1)
    expected = dense.gather(3, keys.clamp(min=0).expand(lead[0], 2, -1, -1))
    assert torch.equal(found, torch.where(keys < 0, 0.25, expected))


def test_tables_over_other_numbers_of_axes():
    for sizes in ((6,), (2, 3, 2)):
        grid = Grid(*sizes, prefix=1)
        table = random_tensor(1, *(3,) * len(sizes), seed=0)
        found = RelativeTable(table, grid).dense(grid.tokens)
        for query, key in itertools.product(range(grid.tokens), repeat=2):
            assert found[0, 0, query, key].item() == by_hand(table, grid, (1,) * len(sizes), 0.0, 0, query, key)


def test_the_gradient_of_an_entry_counts_the_pairs_that_use_it():
    grid = Grid(3, 3)
    table = torch.zeros(1, 3, 3, requires_grad=True)
    RelativeTable(table, grid).dense(9).sum().backward()
    assert table.grad.tolist() == [[[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]]


@given(
    extents=st.tuples(st.sampled_from([1, 3, 5, 9]), st.sampled_from([1, 3, 7])),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 9])),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    seed=seeds(),
)
def test_values_of_a_window(extents, kernel, dilation, seed):
    """The same as looked up around a query in the middle of a grid that holds the whole window."""
    reach = [size // 2 * step for size, step in zip(kernel, dilation, strict=True)]
    grid = Grid(2 * reach[0] + 1, 2 * reach[1] + 1)
    relative = RelativeTable(random_tensor(2, *extents, seed=seed), grid, fill=0.5)
    axes = [torch.arange(size) * step for size, step in zip(kernel, dilation, strict=True)]
    keys = (axes[0][:, None] * grid.width + axes[1]).flatten()
    middle = torch.tensor(reach[0] * grid.width + reach[1])
    looked_up = relative.lookup(middle[None, None, None], keys[None, None])
    assert torch.equal(relative.window(kernel, dilation), looked_up[0])


def test_what_a_table_fits():
    table = RelativeTable(torch.zeros(1, 3, 3), Grid(4, 6), stride=2)
    assert table.fits(Grid(4, 6), (2, 2))
    assert not table.fits(Grid(4, 6), 1)
    assert not table.fits(Grid(6, 4), 2)
