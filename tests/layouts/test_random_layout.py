"""random_layout: pinned call, repeatable, and varied enough to be worth drawing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attnkit import Grid
from attnkit.errors import ConfigError
from attnkit.testing import KINDS, random_layout
from attnkit.testing.strategies import layout_cases

GRID = Grid(3, 4, prefix=2)


@given(case=layout_cases())
def test_what_it_returns(case):
    assert case.layout.kind in KINDS
    assert (case.layout.num_queries, case.layout.num_keys) == case.sizes
    mask = case.layout.to_mask()
    assert mask.expand(case.batch, case.heads, *case.sizes).dtype == torch.bool


@given(case=layout_cases())
def test_equal_seeds_give_equal_layouts_and_the_global_state_stays(case):
    before = torch.get_rng_state()
    layout, sizes = random_layout(case.layout.kind, case.grid, batch=case.batch, heads=case.heads, seed=case.seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert sizes == case.sizes
    assert torch.equal(layout.to_mask(), case.layout.to_mask())


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_vary_what_the_kind_can_express(kind):
    layouts = [random_layout(kind, GRID, batch=2, heads=3, seed=seed)[0] for seed in range(60)]
    masks = [layout.to_mask() for layout in layouts]
    assert len({tuple(layout.visible().flatten().tolist()) for layout in layouts}) > (3 if kind == "dense" else 20)
    assert {layout.key_mask is None for layout in layouts} == {True, False}
    assert any(not mask.any(-1).all() for mask in masks), "no query that sees nothing"
    assert {mask.shape[0] for mask in masks} == {1, 2}
    assert {mask.shape[1] for mask in masks} == {1, 3}


def test_stencils_vary_in_all_their_options():
    layouts = [random_layout("stencil", GRID, seed=seed)[0] for seed in range(60)]
    assert {layout.border for layout in layouts} == {"mask", "clamp"}
    assert len({layout.stride for layout in layouts}) > 4
    assert len({layout.dilation for layout in layouts}) > 4
    assert len({layout.kernel for layout in layouts}) > 8


def test_blocks_come_in_all_forms():
    layouts = [random_layout("blocks", GRID, batch=2, heads=3, seed=seed)[0] for seed in range(200)]
    assert {layout.index is None for layout in layouts} == {True, False}
    assert any(layout.key_order is not None for layout in layouts)
    assert any(layout.index is not None and bool((layout.index < 0).any()) for layout in layouts)
    assert {layout.order.token.shape[0] for layout in layouts} == {1, 2}
    assert {layout.order.token.shape[1] for layout in layouts} == {1, 3}
    assert {layout.index.shape[:2] for layout in layouts if layout.index is not None} >= {(1, 1), (2, 1), (2, 3)}


def test_other_numbers_of_axes():
    for sizes in ((9,), (2, 2, 3)):
        for kind in KINDS:
            for seed in range(5):
                layout, (queries, keys) = random_layout(kind, Grid(*sizes, prefix=1), batch=2, heads=2, seed=seed)
                assert layout.to_mask().shape[-2:] == (queries, keys)


def test_mistakes():
    with pytest.raises(ConfigError, match=r"unknown kind of layout 'block'; did you mean 'blocks'"):
        random_layout("block", GRID)
    with pytest.raises(ConfigError, match=r"random_layout\(heads=\.\.\.\) must be an integer >= 1, but got 0"):
        random_layout("dense", GRID, heads=0)
