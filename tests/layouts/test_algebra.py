"""Layout algebra agrees with boolean algebra on masks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attnkit import Grid
from attnkit.errors import LayoutError
from attnkit.layouts import Blocks, Dense, TokenMask, TokenSets, concat_heads, intersect, union
from attnkit.testing import KINDS, random_layout
from attnkit.testing.strategies import grids, seeds

OPERATIONS = {union: torch.logical_or, intersect: torch.logical_and}


@st.composite
def pairs_of_layouts(draw):
    """Two random layouts over the same queries and keys, with the items and heads they may vary over."""
    grid = draw(grids(max_height=4, max_width=5, max_prefix=2))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    found = [
        random_layout(draw(st.sampled_from(KINDS)), grid, batch=batch, heads=heads, seed=draw(seeds()))
        for _ in range(2)
    ]
    assume(found[0][1] == found[1][1])
    return found[0][0], found[1][0], (batch, heads, *found[0][1])


@pytest.mark.parametrize("operation", OPERATIONS)
@given(pair=pairs_of_layouts())
def test_pairs_of_any_kinds(operation, pair):
    first, second, shape = pair
    expected = OPERATIONS[operation](first.to_mask().expand(shape), second.to_mask().expand(shape))
    found = operation(first, second)
    assert torch.equal(found.to_mask().expand(shape), expected)
    assert torch.equal(found.visible().expand(shape[:3]), expected.sum(-1))


@pytest.mark.parametrize("operation", OPERATIONS)
@given(grid=grids(max_height=5, max_width=5), seed=seeds(), keys=st.booleans(), shared=st.booleans())
def test_blocks_over_one_order_stay_blocks(operation, grid, seed, keys, shared):
    generator = torch.Generator().manual_seed(seed)
    leads = ((2, 1) if shared else (2, 3), (1, 3))
    layouts = [
        Blocks.from_regions(grid, 2, torch.randint(-1, 4, (*lead, 4, width), generator=generator))
        for lead, width in zip(leads, (2, 3), strict=True)
    ]
    if keys:
        layouts[1] = layouts[1].restrict(torch.rand(grid.tokens, generator=generator) < 0.7)
    shape = (2, 3, grid.tokens, grid.tokens)
    expected = OPERATIONS[operation](*(layout.to_mask().expand(shape) for layout in layouts))
    found = operation(*layouts)
    assert isinstance(found, Blocks if not keys else TokenMask)
    assert torch.equal(found.to_mask().expand(shape), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_windows_and_routed_blocks_over_one_order(operation):
    grid = Grid(4, 4, prefix=1)
    own = Blocks.from_regions(grid, 2, torch.arange(4)[None, :, None])
    windows = Blocks(own.order, prefix=1)
    routed = Blocks(own.order, torch.tensor([[1], [2], [2], [-1]]), prefix=1)
    expected = OPERATIONS[operation](windows.to_mask(), routed.to_mask())
    for found in (operation(windows, routed), operation(routed, windows)):
        assert isinstance(found, Blocks)
        assert torch.equal(found.to_mask(), expected)


@given(seed=seeds(), heads=st.integers(1, 3))
def test_small_token_sets_stay_token_sets(seed, heads):
    generator = torch.Generator().manual_seed(seed)
    first = TokenSets(torch.randint(-1, 20, (1, heads, 6, 3), generator=generator), 20, keys_all=2)
    second = TokenSets(torch.randint(-1, 20, (2, 1, 6, 2), generator=generator), 20, keys_all=2)
    found = union(first, second)
    assert isinstance(found, TokenSets)
    shape = (2, heads, 6, 20)
    assert torch.equal(found.to_mask().expand(shape), first.to_mask().expand(shape) | second.to_mask().expand(shape))
    assert torch.equal(found.visible().expand(shape[:3]), found.to_mask().expand(shape).sum(-1))


def test_dense_is_the_neutral_or_the_absorbing_one():
    layout = TokenMask(torch.rand(3, 4) < 0.5)
    dense = Dense(3, 4)
    assert union(layout, dense) is dense
    assert union(dense, layout) is dense
    assert intersect(layout, dense) is layout
    assert intersect(dense, layout) is layout
    kept = torch.tensor([True, False, True, True])
    narrowed = intersect(Dense(3, 4).restrict(kept), layout)
    assert torch.equal(narrowed.to_mask(), layout.to_mask() & kept)


@given(pair=pairs_of_layouts(), counts=st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_concatenated_heads(pair, counts):
    first, second, (batch, heads, *sizes) = pair

    def own(layout):
        varying = layout.visible().shape[1] > 1 or layout.to_mask().shape[1] > 1
        return heads if varying else counts[0]

    parts = [(first, own(first)), (second, own(second)), (first, own(first))]
    expected = torch.cat([layout.to_mask().expand(batch, count, *sizes) for layout, count in parts], dim=1)
    found = concat_heads(parts)
    assert torch.equal(found.to_mask().expand(batch, expected.shape[1], *sizes), expected)


@given(grid=grids(max_height=5, max_width=5), seed=seeds(), heads=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_concatenated_blocks_over_one_order_stay_blocks(grid, seed, heads):
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        Blocks.from_regions(grid, 2, torch.randint(-1, 4, (2, lead, 4, width), generator=generator))
        for lead, width in zip((1, heads[1]), (1, 3), strict=True)
    )
    found = concat_heads([(first, heads[0]), (second, heads[1])])
    assert isinstance(found, Blocks)
    sizes = (grid.tokens, grid.tokens)
    parts = [first.to_mask().expand(2, heads[0], *sizes), second.to_mask().expand(2, heads[1], *sizes)]
    assert torch.equal(found.to_mask(), torch.cat(parts, dim=1))


def test_a_hint_is_in_nobodys_way():
    """A layout for one head stays one, whatever number of heads its groups of queries are for."""
    layout = TokenMask(torch.rand(3, 4) < 0.5, query_groups=torch.zeros(2, 3, 3, dtype=torch.int64))
    other = TokenMask(torch.rand(5, 2, 3, 4) < 0.5)
    assert layout.lead == (1, 1)
    assert concat_heads([(layout, 1), (layout, 2)]).to_mask().shape == (1, 3, 3, 4)
    assert torch.equal(union(layout, other).to_mask(), layout.to_mask() | other.to_mask())
    assert torch.equal(intersect(layout, other).to_mask(), layout.to_mask() & other.to_mask())


def test_concatenated_blocks_whose_order_varies_over_heads():
    permutation = torch.rand(1, 2, 6).argsort(-1)
    first = Blocks.permuted(permutation, 3)
    second = dataclasses.replace(first, index=torch.tensor([[1], [0]]))
    found = concat_heads([(first, 2), (second, 2)])
    assert torch.equal(found.to_mask(), torch.cat([first.to_mask(), second.to_mask()], dim=1))


def test_one_part_is_spread_over_its_heads_by_broadcasting():
    layout = Dense(3)
    assert concat_heads([(layout, 4)]) is layout


def test_other_sizes_are_refused():
    for operation in (union, intersect, lambda one, other: concat_heads([(one, 1), (other, 1)])):
        with pytest.raises(LayoutError, match=r"the same queries and keys, but got \(3, 4\) and \(3, 5\)"):
            operation(Dense(3, 4), Dense(3, 5))


def test_no_parts_are_refused():
    with pytest.raises(LayoutError, match=r"concat_heads needs a list of \(layout, number of heads\), but got \[\]"):
        concat_heads([])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("alone", [True, False])
def test_a_layout_that_varies_over_other_heads_is_refused(count, alone):
    layout = TokenMask(torch.rand(2, 3, 4) < 0.5)
    parts = [(layout, count)] if alone else [(Dense(3, 4), 1), (layout, count)]
    with pytest.raises(LayoutError, match=rf"varies over 2 heads but {count}"):
        concat_heads(parts)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_heads_below_one_is_refused(count):
    with pytest.raises(LayoutError, match="number of heads"):
        concat_heads([(Dense(3), 1), (Dense(3), count)])
