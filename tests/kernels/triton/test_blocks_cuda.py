"""Blocks on a GPU, against float64: the cases of the interpreted tests, and what only a GPU tells."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, attend
from attnkit.kernels import recording
from attnkit.kernels.ops.blocks import BLOCKS
from attnkit.layouts import Blocks
from attnkit.testing import random_qkv
from tests.kernels.triton import block_cases
from tests.kernels.triton.block_cases import CASES, answers, check, regions
from tests.kernels.triton.packing_cases import CASES as PACKED

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def tiles_of_their_own(monkeypatch):
    """Small regions too are computed by the kernels of blocks."""
    monkeypatch.setattr("attnkit.kernels.triton.backend.shares_tiles", lambda call: False)


@pytest.mark.usefixtures("tiles_of_their_own")
@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name):
    check(CASES[name], "cuda")


@pytest.mark.parametrize("name", PACKED)
def test_small_regions_that_share_tiles(name):
    check(PACKED[name], "cuda")


@pytest.mark.usefixtures("tiles_of_their_own")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("side", [2, 4, 7, 8, 16])
def test_region_sizes_and_widths(side, width, dtype):
    grid = Grid(4 * side, 4 * side)
    case = block_cases.Case(
        lambda: Blocks.from_regions(grid, 4, block_cases.routes(16, 2, 1, keep=4).cuda()),
        (width, width),
        {"dtype": dtype},
    )
    check(case, "cuda")


@pytest.mark.parametrize("name", block_cases.OPERATORS)
def test_as_the_kernels_of_the_cpu(name):
    block_cases.check_operator(block_cases.OPERATORS[name], BLOCKS, "cuda")


@pytest.mark.usefixtures("tiles_of_their_own")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", block_cases.POISONED)
def test_what_nobody_sees_matters_to_nobody(name, poison, with_bias):
    block_cases.check_poisoned(block_cases.POISONED[name](), poison, with_bias, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", block_cases.HIDING)
@pytest.mark.parametrize("name", block_cases.HIDDEN)
def test_what_a_large_bias_hides(name, hidden, dtype):
    block_cases.check_hidden(block_cases.HIDDEN[name](), hidden, dtype, "cuda")


def test_autocast():
    block_cases.check_autocast(BLOCKS, "cuda")


def large(dtype=torch.bfloat16):
    layout = block_cases.moved(regions(Grid(64, 64), 8, 2, 1, keep=8), "cuda")
    given = random_qkv((4096, 4096), batch=2, heads=4, head_dim=32, dtype=torch.float32)
    return layout, [one.to("cuda", dtype) for one in given]


def small_regions(dtype=torch.bfloat16):
    """BiFormer's third stage at 224 x 224, where regions share tiles."""
    layout = block_cases.moved(regions(Grid(14, 14), 7, 2, 1, keep=16), "cuda")
    given = random_qkv((196, 196), batch=2, heads=4, head_dim=32, dtype=torch.float32)
    return layout, [one.to("cuda", dtype) for one in given]


@pytest.mark.parametrize("made", [large, small_regions])
def test_the_same_bits_twice(made):
    layout, given = made()
    first, second = (answers(layout, given, None, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_chosen_for_blocks():
    layout, given = large()
    with recording() as choices:
        attend(*given, layout)
    assert choices[0].backend == "triton"


@pytest.mark.parametrize("made", [large, small_regions])
def test_nothing_waits_for_the_gpu(made):
    layout, given = made()
    answers(layout, given, None, "triton")
    leaves = [one.requires_grad_() for one in given]
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*leaves, layout, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("made", [large, small_regions])
def test_captured_by_a_graph(made):
    layout, given = made()
    leaves = [one.requires_grad_() for one in given]

    def step():
        out = attend(*leaves, layout, backend="triton")
        return (out, *torch.autograd.grad(out.sum(), leaves))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [one.clone() for one in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("made", [large, small_regions])
def test_compiled(made):
    layout, given = made()
    leaves = [one.requires_grad_() for one in given]

    def step(q, k, v):
        return attend(q, k, v, layout, backend="triton")

    compiled = torch.compile(step, fullgraph=True)
    results = [
        (out := one(*leaves), *torch.autograd.grad(out.float().square().sum(), leaves)) for one in (step, compiled)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_float32_is_exact_unless_tf32_is_allowed(monkeypatch):
    layout, given = large(torch.float32)
    exact = answers(layout, [one.double() for one in given], None, "gather")
    errors = {}
    for setting in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", setting)
        found = answers(layout, given, None, "triton")
        errors[setting] = float((found[0].double() - exact[0]).abs().max())
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


def test_no_memory_beside_the_results():
    layout, given = large()
    leaves = [one.requires_grad_() for one in given]
    attend(*leaves, layout, backend="triton").sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = attend(*given, layout, backend="triton")
    # The output, and two numbers of four bytes a query.
    more = torch.cuda.max_memory_allocated() - before - out.numel() * 2 - out.numel() // 32 * 8
    assert more < 2**16
