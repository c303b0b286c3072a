"""Which calls over small regions share tiles."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid
from attnkit.kernels.call import AttendCall
from attnkit.kernels.triton.packing import shares_tiles
from attnkit.layouts import Blocks, Stencil
from tests.kernels.triton.block_cases import HEADS, other_keys, regions
from tests.kernels.triton.packing_cases import CASES


def call_of(layout, heads=2, width=32, dtype=torch.bfloat16, **more):
    q, k = (torch.empty(1, heads, one, width, dtype=dtype) for one in (layout.num_queries, layout.num_keys))
    return AttendCall(q, k, k, layout, 1.0, **more)


# BiFormer's third stage at 224 x 224.
STAGE = regions(Grid(14, 14), 7, 1, 1, keep=16)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_do(name):
    case = CASES[name]
    heads, dtype = case.options.get("heads", HEADS), case.options.get("dtype", torch.float32)
    assert shares_tiles(call_of(case.layout(), heads, min(case.widths), dtype))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (STAGE, True),
        # 4 tokens of 16 rows, so a quarter of all keys and up.
        (regions(Grid(14, 14), 7, 1, 1, keep=13), True),
        (regions(Grid(14, 14), 7, 1, 1, keep=12), False),
        (regions(Grid(14, 14, prefix=3), 7, 1, 1, keep=13), True),
        (regions(Grid(14, 14, prefix=3), 7, 1, 1, keep=12), False),
        # 9 tokens of 16 rows.
        (regions(Grid(12, 12), 4, 1, 1, keep=9), True),
        (regions(Grid(12, 12), 4, 1, 1, keep=8), False),
        (regions(Grid(20, 15), 5, 1, 1, keep=25), True),
        # 15 tokens leave a row of 16 empty; 16 leave none, though all keys are seen.
        (regions(Grid(10, 6), 2, 1, 1, keep=4), True),
        (regions(Grid(8, 8), 2, 1, 1, keep=4), False),
        (regions(Grid(20, 20), 5, 1, 1, keep=25), False),
        (other_keys(), True),
        (Blocks.windows(Grid(4, 4), 2), False),
        (Blocks.windows(Grid(2, 2), 2), False),
        (Stencil(Grid(4, 4), 3), False),
    ],
)
def test_by_tokens_and_density(layout, expected):
    assert shares_tiles(call_of(layout)) is expected
    assert not shares_tiles(call_of(layout, bias=torch.empty(1, 2, 1, layout.num_keys)))


@pytest.mark.parametrize(("side", "lead", "dtype", "expected"), [
    (22, 1, torch.bfloat16, False),
    (18, 1, torch.bfloat16, True),
    (22, 1, torch.float32, True),
    (18, 2, torch.bfloat16, False),
])  # fmt: skip
def test_by_memory(side, lead, dtype, expected):
    """A mask of 18 x 18 or 22 x 22 tokens, beside two heads of 32 numbers."""
    layout = regions(Grid(side, side), side // 2, 1, lead, keep=(side // 2) ** 2)
    assert shares_tiles(call_of(layout, dtype=dtype)) is expected
