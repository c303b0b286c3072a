"""Lowering and restricting keep their promise on the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.errors import LayoutError
from attnkit.layouts import Blocks, Dense, Stencil, TokenMask, TokenSets, restrict
from attnkit.testing.strategies import layout_cases, seeds


def full_mask(case, layout):
    return layout.to_mask().expand(case.batch, case.heads, *case.sizes)


@given(case=layout_cases(), kind=st.sampled_from(["token_sets", "token_mask"]))
def test_lowering_keeps_the_mask(case, kind):
    lowered = case.layout.lower(kind)
    assert lowered.kind == kind
    assert torch.equal(full_mask(case, lowered), full_mask(case, case.layout))
    assert torch.equal(lowered.visible().expand(case.batch, case.heads, -1), full_mask(case, case.layout).sum(-1))


@given(case=layout_cases())
def test_lowering_to_its_own_kind_is_the_layout(case):
    assert case.layout.lower(case.layout.kind) is case.layout


@given(case=layout_cases())
def test_token_sets_of_few_keys_stay_lists_of_few_keys(case):
    lists = case.layout.lower("token_sets")
    assert lists.key_slots <= max(case.layout.key_slots, case.layout.num_keys)


@given(case=layout_cases(["blocks", "stencil"]))
def test_lists_have_no_repeats(case):
    rows = case.layout.lower("token_sets").index.flatten(0, -2)
    for row in rows.tolist():
        real = [key for key in row if key >= 0]
        assert len(real) == len(set(real))


@pytest.mark.parametrize(
    "layout",
    [Dense(4), TokenSets(torch.zeros(4, 1, dtype=torch.int64), 4), TokenMask(torch.ones(4, 4, dtype=torch.bool))],
)
@pytest.mark.parametrize("kind", ["stencil", "blocks"])
def test_what_cannot_be_lowered_says_what_can(layout, kind):
    with pytest.raises(LayoutError, match=rf"a {layout.kind} layout cannot be written as {kind}; .*'token_sets'"):
        layout.lower(kind)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(LayoutError, match=r"unknown kind of layout 'token_set'; did you mean 'token_sets'"):
        Dense(4).lower("token_set")


@given(case=layout_cases(), seed=seeds(), form=st.sampled_from(["keys", "batch", "batch and heads", "shared"]))
def test_restricting_keys_masks_them(case, seed, form):
    lead = {"keys": (), "batch": (case.batch,), "batch and heads": (case.batch, case.heads), "shared": (1, 1)}[form]
    keys = torch.rand(*lead, case.sizes[1], generator=torch.Generator().manual_seed(seed)) < 0.6
    full = keys[:, None] if form == "batch" else keys
    expected = full_mask(case, case.layout) & full[..., None, :]
    for restricted in (case.layout.restrict(keys), restrict(case.layout, keys)):
        assert restricted.kind == case.layout.kind
        assert torch.equal(full_mask(case, restricted), expected)
        assert torch.equal(restricted.visible().expand(case.batch, case.heads, -1), expected.sum(-1))
    assert torch.equal(full_mask(case, case.layout.restrict(keys).lower("token_sets")), expected)


@given(
    case=layout_cases(),
    seed=seeds(),
    with_keys=st.booleans(),
    form=st.sampled_from(["rows", "batch", "batch and heads"]),
)
def test_restricting_queries_empties_their_rows(case, seed, with_keys, form):
    lead = {"rows": (), "batch": (case.batch,), "batch and heads": (case.batch, case.heads)}[form]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(*lead, case.sizes[0], generator=generator) < 0.6
    keys = torch.rand(case.sizes[1], generator=generator) < 0.6 if with_keys else None
    full = rows[:, None] if form == "batch" else rows
    expected = full_mask(case, case.layout) & full[..., None]
    if keys is not None:
        expected = expected & keys
    assert torch.equal(full_mask(case, restrict(case.layout, keys, rows)), expected)


def test_restricting_nothing_is_the_layout():
    layout = Dense(3)
    assert restrict(layout) is layout


def test_restricting_twice_keeps_what_both_keep():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([[True, False, True, False]])
    for layout in (Dense(2, 4), Blocks.permuted(torch.arange(4), 2), TokenMask(torch.ones(2, 4, dtype=torch.bool))):
        twice = layout.restrict(first).restrict(second)
        assert torch.equal(twice.to_mask(), layout.restrict(first & second[0]).to_mask())


@pytest.mark.parametrize(
    "keys",
    [
        torch.ones(5, dtype=torch.bool),
        torch.ones(4),
        torch.ones((), dtype=torch.bool),
        torch.ones(1, 1, 1, 4, dtype=torch.bool),
    ],
)
def test_masks_that_do_not_fit_are_refused(keys, grid_of_four):
    for layout in (Dense(4), Stencil(grid_of_four, 3), Blocks.windows(grid_of_four, 2)):
        with pytest.raises(LayoutError, match=r"restrict needs a bool tensor .* Nk = 4, but got (torch\.|tensor)"):
            layout.restrict(keys)
        with pytest.raises(
            LayoutError, match=r"restrict needs queries as a bool tensor .* Nq = 4, but got (torch\.|tensor)"
        ):
            restrict(layout, queries=keys)
