"""Orders: cuts of the grid into blocks are consistent tables, made once."""

from __future__ import annotations

import torch
from hypothesis import given

from attnkit import Grid
from attnkit.layouts import Blocks
from attnkit.testing.strategies import layout_cases


@given(case=layout_cases(["blocks"]))
def test_slots_and_tokens_are_inverse(case):
    layout = case.layout
    for order in (layout.order, layout.keys_cut):
        tokens, slots = order.token.flatten(2), order.slot
        assert torch.equal(tokens.gather(2, slots) - layout.prefix, torch.arange(slots.shape[2]).expand_as(slots))
        assert (tokens >= 0).sum() == slots.numel()
        assert order.padded or bool((tokens >= 0).all())


def test_a_cut_is_made_once():
    grid = Grid(5, 7)
    first, second = Blocks.windows(grid, 3), Blocks.windows(grid, 3)
    assert first.order.token is second.order.token
    assert Blocks.windows(grid, 4).order.token is not first.order.token


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        order = Blocks.windows(Grid(6, 11), 5).order
    assert not order.token.is_inference()
    assert not order.slot.is_inference()
