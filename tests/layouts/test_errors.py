"""Layouts that cannot be: one sentence each."""

from __future__ import annotations

import pytest
import torch

from attnkit import AttnkitError, Grid
from attnkit.errors import LayoutError
from attnkit.layouts import (
    Blocks,
    Dense,
    RelativeTable,
    Stencil,
    TokenMask,
    TokenSets,
    concat_heads,
    intersect,
    restrict,
    union,
)
from attnkit.layouts.orders import Order
from attnkit.testing import random_layout

GRID = Grid(4, 4)
NONE = torch.zeros(1, 0, dtype=torch.int64)
MASK = torch.ones(4, 4, dtype=torch.bool)
WINDOWS = Blocks.windows(GRID, 2)


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
    "permuted window of nothing": (
        lambda: Blocks.permuted(torch.arange(4), 0),
        r"a window >= 1 .*, but got torch\.int64 \(4,\), 0 and 0",
    ),
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
        r"TokenSets\(keys_all=5\): must be <= keys=4",
    ),
    "negative global queries": (
        lambda: TokenSets(NONE, 4, queries_all=-1),
        r"an integer >= 0 as queries_all, but got -1",
    ),
    "groups of other queries": (
        lambda: TokenSets(integers(3, 2), 4, queries_all=1, query_groups=integers(4)),
        r"TokenSets needs query_groups as an int32 or int64 tensor \(B or 1, heads or 1, 3\), a number for each query "
        r"that has a list, but got torch\.int64 \(4,\)",
    ),
    "groups of floats": (
        lambda: TokenMask(torch.ones(2, 2, dtype=torch.bool), query_groups=torch.zeros(2)),
        r"TokenMask needs query_groups as an int32 or int64 tensor .* for each query, but got torch\.float32 \(2,\)",
    ),
    "groups of other heads": (
        lambda: TokenMask(torch.ones(3, 2, 2, dtype=torch.bool), query_groups=integers(2, 2)),
        r"must vary over the same \(items, heads\)",
    ),
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
    "pairs of a name": (lambda: Dense(4).pairs("2"), r"batch is an integer >= 0, .* but got '2'"),
    "pairs of fewer than no heads": (lambda: Dense(4).pairs(heads=-1), r"heads is an integer >= 0, .* but got -1"),
    "multiply-adds of no width": (lambda: Dense(4).flops(0), r"head_dim is a width, an integer >= 1, but got 0"),
    "multiply-adds of half a width": (lambda: Dense(4).flops(4, 0.5), r"value_dim is a width, .* but got 0\.5"),
    "queries as a truth value": (lambda: Dense(True), r"integers >= 0, but got True"),
    "keys as a fraction": (lambda: TokenSets(NONE, 4.0), r"an integer >= 0 as keys, but got 4\.0"),
    "negative prefix": (lambda: Blocks(WINDOWS.order, prefix=-1), r"an integer >= 0 as prefix, but got -1"),
    "windows as an order": (
        lambda: Blocks(WINDOWS),
        r"needs an order such as that of Blocks\.windows.* but got Blocks\(",
    ),
    "a table as an order": (lambda: Blocks(integers(2, 2)), r"needs an order .* but got torch\.int64 \(2, 2\)"),
    "a permuted fraction": (lambda: Blocks.permuted(torch.arange(4), 2.0), r"a window >= 1 .* and 2\.0|, 2\.0 and 0"),
    "a permutation behind a negative prefix": (lambda: Blocks.permuted(torch.arange(4), 2, prefix=-1), r"2 and -1"),
    "more regions than rows": (
        lambda: Blocks.from_regions(GRID, 10**9, integers(1, 4, 1)),
        r"has 4 rows but there are",
    ),
    "a mask of keys with two axes": (
        lambda: Dense(4, key_mask=torch.ones(1, 4, dtype=torch.bool)),
        r"key_mask is a bool tensor .* but got torch\.bool \(1, 4\); layout\.restrict",
    ),
    "a mask of other keys": (
        lambda: Dense(4, key_mask=torch.ones(1, 1, 3, dtype=torch.bool)),
        r"Nk = 4, .*\(1, 1, 3\)",
    ),
    "a relative table on a tuple": (lambda: RelativeTable(torch.zeros(2, 3, 3), (4, 4)), r"needs a Grid.*\(4, 4\)"),
    "a relative table with a name": (lambda: RelativeTable(torch.zeros(2, 3, 3), GRID, fill="0"), r"fill, but got '0'"),
    "union with a mask": (lambda: union(Dense(4), MASK), r"union needs layouts, .* but got torch\.bool \(4, 4\)"),
    "intersection of nothing": (lambda: intersect(None, Dense(4)), r"intersect needs layouts, .* but got None"),
    "restriction of a mask": (lambda: restrict(MASK, MASK[0]), r"restrict needs layouts, .* but got torch\.bool"),
    "heads without numbers": (lambda: concat_heads([Dense(4), Dense(4)]), r"a list of \(layout, number of heads\)"),
    "heads of one layout": (lambda: concat_heads(Dense(4)), r"a list of \(layout, number of heads\), but got Dense"),
    "heads of masks": (lambda: concat_heads([(Dense(4), 1), (MASK, 1)]), r"concat_heads needs layouts, .* torch\.bool"),
    "half a head": (lambda: concat_heads([(Dense(4), 0.5)]), r"a number of heads >= 1 for every layout, but got 0\.5"),
    "lowering to a layout": (lambda: Dense(4).lower(Dense(4)), r"unknown kind of layout Dense\(queries=4"),
    "keys for other items": (
        lambda: TokenMask(torch.ones(2, 1, 3, 3, dtype=torch.bool)).restrict(torch.ones(3, 3, dtype=torch.bool)),
        r"\(2, 1\).*\(3, 1\)|\(3, 1\).*\(2, 1\)",
    ),
    "queries of other items": (
        lambda: restrict(
            TokenMask(torch.ones(2, 1, 3, 3, dtype=torch.bool)), queries=torch.ones(3, 3, dtype=torch.bool)
        ),
        r"\(2, 1\) and \(3, 1\)",
    ),
    "more tokens than anybody has": (
        lambda: Dense(2**63),
        r"numbers of queries and keys, .* but got 9223372036854775808",
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


INDEX = torch.zeros(4, 1, dtype=torch.int64)

# Functions whose arguments are data, each with good values.
CALLS = {
    "Dense": (Dense, {"queries": 4, "keys": 4, "key_mask": None}),
    "Stencil": (Stencil, {"grid": GRID, "kernel": 3, "stride": 1, "dilation": 1, "border": "mask", "key_mask": None}),
    "Blocks": (Blocks, {"order": WINDOWS.order, "index": None, "prefix": 0, "key_order": None, "key_mask": None}),
    "Blocks.windows": (Blocks.windows, {"grid": GRID, "window": 2, "shift": None}),
    "Blocks.permuted": (Blocks.permuted, {"permutation": torch.arange(4), "window": 2, "prefix": 0}),
    "Blocks.from_regions": (Blocks.from_regions, {"grid": GRID, "regions_per_side": 2, "index": INDEX}),
    "TokenSets": (TokenSets, {"index": INDEX, "keys": 4, "queries_all": 0, "keys_all": 0, "key_mask": None}),
    "TokenMask": (TokenMask, {"mask": MASK, "key_mask": None}),
    "RelativeTable": (RelativeTable, {"table": torch.zeros(2, 3, 3), "grid": GRID, "stride": 1, "fill": 0.0}),
    "union": (union, {"first": TokenMask(MASK), "second": Dense(4)}),
    "intersect": (intersect, {"first": TokenMask(MASK), "second": Dense(4)}),
    "restrict": (restrict, {"layout": TokenMask(MASK), "keys": None, "queries": None}),
    "concat_heads": (concat_heads, {"parts": [(Dense(4), 1), (TokenMask(MASK), 2)]}),
    "Layout.restrict": (TokenMask(MASK).restrict, {"keys": MASK[0]}),
    "Layout.lower": (TokenMask(MASK).lower, {"kind": "token_mask"}),
    "Layout.pairs": (TokenMask(MASK).pairs, {"batch": 1, "heads": 1}),
    "Layout.flops": (TokenMask(MASK).flops, {"head_dim": 4, "value_dim": 4, "batch": 1, "heads": 1}),
    "random_layout": (
        random_layout,
        {"kind": "blocks", "grid": GRID, "batch": 1, "heads": 1, "seed": 0, "device": None},
    ),
}
PLAIN = [None, True, -1, 0, 2.5, float("nan"), "x", "", b"x", [], [1, 2], (3,), (), {}, {"a": 1}, object(), Grid]
TYPED = [
    GRID,
    Dense(4),
    torch.ones(4, 4),
    MASK,
    INDEX,
    torch.tensor(3),
    torch.ones(4, 4).numpy(),
    torch.nn.Linear(2, 2),
]


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_is_answered_by_a_sentence(name):
    function, good = CALLS[name]
    function(**good)
    refused = 0
    for argument in good:
        for wrong in (*PLAIN, *TYPED):
            try:
                function(**{**good, argument: wrong})
            except AttnkitError as error:
                assert str(error) and "\n" not in str(error) and len(str(error)) < 400
                refused += 1
    assert refused > 10 * len(good)
