"""The corners of what a primitive takes, each met on purpose and not by luck."""

from __future__ import annotations

import pytest

from attnkit import (
    Conv,
    CrossShaped,
    Dense,
    Grid,
    LearnedQuery,
    Linformer,
    MaskPredictor,
    Neighborhood,
    PooledGlobal,
    RandomWindow,
    TopKRegion,
    Window,
)
from attnkit.testing import LAWS, PrimitiveCase, check_case

SMALL = [
    Dense(2),
    Window(2, 3),
    Window(2, 3, partition="shifted", relative_bias=True),
    Window(2, 3, partition="grid"),
    CrossShaped(2, 2),
    Neighborhood(2, 3, relative_bias=True),
    Linformer(2, 9, 3),
    TopKRegion(2, 2, 2),
    TopKRegion(2, 2, 2, routing="per_head", lepe=3),
    MaskPredictor(2, 9, 0.4),
    LearnedQuery(2, 3),
    LearnedQuery(2, 3, stride=2),
    RandomWindow(2, 4),
    PooledGlobal(2, 2),
    Conv(2),
    Conv(2, stride=2),
]
LARGE = [
    Window(2, 50),
    Window(2, 50, partition="shifted"),
    Window(2, 50, partition="grid"),
    CrossShaped(2, 50),
    Neighborhood(2, 49),
    Neighborhood(2, 3, dilation=20),
    Linformer(2, 400, 90),
    TopKRegion(2, 20, 3),
    TopKRegion(2, 2, 50),
    TopKRegion(2, 20, 1000),
    MaskPredictor(2, 400, 1e-6),
    LearnedQuery(2, 49),
    LearnedQuery(2, 3, stride=9),
    RandomWindow(2, 500),
    PooledGlobal(2, 50),
    Conv(2, kernel=49),
    Conv(2, stride=9),
]
QUICK = [law.name for law in LAWS.values() if law.primitive is not None and law.name != "transformed"]


def holds(options, grid, **case):
    for law in QUICK:
        for masked in (False, True):
            check_case(law, PrimitiveCase(options, grid, seed=3, masked=masked, **{"batch": 2, "head_dim": 4, **case}))


def named(options):
    return repr(options)[:40]


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 7), Grid(7, 1), Grid(1, 1, prefix=5), Grid(2, 5, prefix=1)])
@pytest.mark.parametrize("options", SMALL, ids=named)
def test_one_token_one_row_one_column(options, grid):
    holds(options, grid)


@pytest.mark.parametrize("options", LARGE, ids=named)
def test_larger_than_the_grid(options):
    """Windows, kernels, strides and regions beyond the grid; more regions asked for than there are means all."""
    holds(options, Grid(3, 4, prefix=1))


@pytest.mark.parametrize("head_dim", [1, 256])
@pytest.mark.parametrize("options", SMALL, ids=named)
def test_narrow_and_wide_heads(options, head_dim):
    holds(options, Grid(3, 4), head_dim=head_dim, batch=1)


@pytest.mark.parametrize("prefix", range(6))
@pytest.mark.parametrize("options", SMALL, ids=named)
def test_prefix_tokens(options, prefix):
    holds(options, Grid(3, 2, prefix=prefix), batch=1)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("options", SMALL, ids=named)
def test_no_item_and_one(options, batch):
    holds(options, Grid(3, 4, prefix=1), batch=batch)


@pytest.mark.parametrize(
    ("dtype", "memory"), [("float32", "heads_last"), ("bfloat16", "width_first"), ("float16", "every_other")]
)
@pytest.mark.parametrize("options", SMALL, ids=named)
def test_dtypes_and_memory(options, dtype, memory):
    holds(options, Grid(3, 4, prefix=1), dtype=dtype, memory=memory)


def test_a_saturated_softmax_is_no_breach():
    """Logits of 7000: all gradients of the mixing matrix cancel, and what is left is the rounding of large ones."""
    options = Linformer(heads=3, scale=0.7591401201024804, tokens=7, rank=6)
    check_case("transformed", PrimitiveCase(options=options, grid=Grid(1, 2), head_dim=128))
