"""Layouts that cannot be: one sentence each."""

from __future__ import annotations

import pytest
import torch

from attnkit import AttnkitError, Grid
from attnkit.errors import LayoutError
from attnkit.layouts import Blocks, Dense, RelativeTable, Stencil, TokenMask, TokenSets, intersect, union
from attnkit.layouts.orders import Order

GRID = Grid(4, 4)
NONE = torch.zeros(1, 0, dtype=torch.int64)


def integers(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


MISTAKES = {
    "negative queries": (lambda: Dense(-1), r">= 0, but got -1"),
    "negative keys": (lambda: Dense(2, -3), r">= 0, but got 2 and -3"),
    "a fraction of queries": (lambda: Dense(2.5), r"but got 2\.5"),
    "even kernel": (lambda: Stencil(GRID, 4), r"must be odd so that a query is its centre, but got \(4, 4\)"),
    "kernel of nothing": (lambda: Stencil(GRID, 0), r"Stencil kernel is an integer >= 1 .* but got 0"),
    "kernel for three axes": (lambda: Stencil(GRID, (3, 3, 3)), r"one per axis of Grid\(4, 4\), but got \(3, 3, 3\)"),
    "kernel that is no integer": (lambda: Stencil(GRID, 3.0), r"Stencil kernel is an integer .* but got 3\.0"),
    "no kernel": (lambda: Stencil(GRID, None), r"Stencil kernel is an integer .* but got None"),
    "stride of nothing": (lambda: Stencil(GRID, 3, stride=0), r"Stencil stride is an integer >= 1"),
    "negative dilation": (lambda: Stencil(GRID, 3, dilation=(1, -1)), r"Stencil dilation is an integer >= 1"),
    "unknown border": (lambda: Stencil(GRID, 3, border="wrap"), r"must be 'mask' or 'clamp', but got 'wrap'"),
    "no grid": (lambda: Stencil((4, 4), 3), r"needs a Grid.*but got \(4, 4\)"),
    "window of nothing": (lambda: Blocks.windows(GRID, 0), r"window is an integer >= 1 .* but got 0"),
    "negative shift": (lambda: Blocks.windows(GRID, 2, shift=-1), r"shift is an integer >= 1 .* but got -1"),
    "regions of nothing": (
        lambda: Blocks.from_regions(GRID, 0, integers(1, 1, 1)),
        r"regions_per_side is an integer >= 1",
    ),
    "rows unlike regions": (
        lambda: Blocks.from_regions(GRID, 2, integers(1, 3, 1)),
        r"has 3 rows but there are 4 blocks",
    ),
    "region beyond the last": (
        lambda: Blocks.from_regions(GRID, 2, integers(1, 4, 1, fill=4)),
        r"in 0\.\.3, or -1 for none, but holds 4\.\.4",
    ),
    "region below -1": (
        lambda: Blocks.from_regions(GRID, 2, integers(1, 4, 1, fill=-2)),
        r"or -1 for none, but holds -2\.\.-2",
    ),
    "floating index": (
        lambda: Blocks.from_regions(GRID, 2, torch.zeros(1, 4, 1)),
        r"needs an integer tensor .* but got torch\.float32",
    ),
    "index of one axis": (lambda: Blocks.from_regions(GRID, 2, integers(4)), r"needs an integer tensor .* \(4,\)"),
    "permutation of floats": (lambda: Blocks.permuted(torch.rand(4), 2), r"int64 permutation"),
    "permutation of two axes": (lambda: Blocks.permuted(integers(2, 4), 2), r"int64 permutation .* \(2, 4\)"),
    "permuted window of nothing": (lambda: Blocks.permuted(torch.arange(4), 0), r"a window >= 1, but got .* and 0"),
    "not a permutation": (lambda: Blocks.permuted(integers(4), 2), r"every .* once"),
    "permutation that starts at 1": (lambda: Blocks.permuted(torch.arange(1, 5), 2), r"every .* once"),
    "an empty permutation": (lambda: Blocks.permuted(integers(0), 2), r"permutation"),
    "blocks without an index": (
        lambda: Blocks(Blocks.windows(GRID, 2).order, key_order=Blocks.windows(GRID, 4).order),
        r"as many blocks of keys as of queries",
    ),
    "an order of three axes": (lambda: Blocks(Order(integers(1, 2, 2), integers(1, 4), False)), r"order of shape"),
    "an index for other items than the order": (
        lambda: Blocks(Blocks.permuted(torch.rand(2, 1, 4).argsort(-1), 2).order, integers(3, 1, 2, 1)),
        r"blocks layout must vary over the same .* \(2, 1\) and \(3, 1\)",
    ),
    "floating token sets": (
        lambda: TokenSets(torch.zeros(3, 2), 4),
        r"needs an integer tensor .* but got torch\.float32",
    ),
    "token sets of one axis": (lambda: TokenSets(integers(3), 4), r"needs an integer tensor .* \(3,\)"),
    "key beyond the last": (
        lambda: TokenSets(integers(1, 1, fill=4), 4),
        r"in 0\.\.3, or -1 for none, but holds 4\.\.4",
    ),
    "key below -1": (lambda: TokenSets(integers(1, 1, fill=-5), 4), r"but holds -5\.\.-5"),
    "more global keys than keys": (
        lambda: TokenSets(NONE, 4, keys_all=5),
        r"keys_all=5\): must lie in 0\.\. and 0\.\.4",
    ),
    "negative global queries": (lambda: TokenSets(NONE, 4, queries_all=-1), r"queries_all=-1, keys_all=0\): must lie"),
    "mask of numbers": (lambda: TokenMask(torch.ones(2, 2)), r"needs a bool tensor .* but got torch\.float32 \(2, 2\)"),
    "mask of one axis": (lambda: TokenMask(torch.ones(2, dtype=torch.bool)), r"needs a bool tensor .* \(2,\)"),
    "table of even extent": (lambda: RelativeTable(torch.zeros(2, 3, 4), GRID), r"odd extent per axis .* \(2, 3, 4\)"),
    "table of one axis": (lambda: RelativeTable(torch.zeros(2, 3), GRID), r"odd extent per axis .* \(2, 3\)"),
    "table of integers": (lambda: RelativeTable(integers(2, 3, 3), GRID), r"RelativeTable needs a .*int64"),
    "table with stride 0": (lambda: RelativeTable(torch.zeros(2, 3, 3), GRID, 0), r"stride is an integer >= 1"),
    "pairs of another batch": (
        lambda: TokenMask(torch.ones(2, 1, 3, 3, dtype=torch.bool)).pairs(3),
        r"varies over batch=2",
    ),
    "pairs of other heads": (
        lambda: TokenMask(torch.ones(2, 3, 3, dtype=torch.bool)).pairs(1, 3),
        r"varies over heads=2",
    ),
    "keys for other items": (
        lambda: TokenMask(torch.ones(2, 1, 3, 3, dtype=torch.bool)).restrict(torch.ones(3, 3, dtype=torch.bool)),
        r"\(2, 1\).*\(3, 1\)|\(3, 1\).*\(2, 1\)",
    ),
    "union over other items": (
        lambda: union(
            TokenMask(torch.ones(2, 1, 3, 3, dtype=torch.bool)), TokenMask(torch.ones(3, 1, 3, 3, dtype=torch.bool))
        ),
        r"\(2, 1\) and \(3, 1\)",
    ),
    "intersection over other heads": (
        lambda: intersect(
            TokenMask(torch.ones(2, 3, 3, dtype=torch.bool)), TokenMask(torch.ones(3, 3, 3, dtype=torch.bool))
        ),
        r"\(1, 2\) and \(1, 3\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(LayoutError, match=message) as caught:
        make()
    assert isinstance(caught.value, (AttnkitError, ValueError))
    assert "\n" not in str(caught.value)
