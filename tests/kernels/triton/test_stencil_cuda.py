"""Stencils on a GPU, against float64: the cases of the interpreted tests, and what only a GPU tells."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, HeadMix, LearnedQuery, attend
from attnkit.kernels import recording, use_backend
from attnkit.layouts import Stencil
from attnkit.testing import random_qkv
from tests.kernels.triton.stencil_cases import CASES, Case, answers, check

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name):
    check(CASES[name], "cuda")


@pytest.mark.parametrize("border", ["mask", "clamp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("kernel", [3, 7, 15])
def test_windows_and_widths(kernel, width, dtype, border):
    layout = Stencil(Grid(20, 23, prefix=1), kernel, border=border)
    check(Case(lambda: layout, False, ("table", None), {"widths": (width, width), "dtype": dtype}), "cuda")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 16, 32, 100])
@pytest.mark.parametrize("kernel", [3, 7, 15])
def test_windows_and_widths_of_learned_queries(kernel, width, dtype, stride):
    layout = Stencil(Grid(20, 23), kernel, stride=stride)
    options = {"widths": (1, width), "dtype": dtype, "scores": torch.float32, "heads": 6}
    check(Case(lambda: layout, True, ("table", "table"), options), "cuda")


def large():
    """Queries of their own, and those of learned ones, with a gradient."""
    layout = Stencil(Grid(64, 64), 7)
    qkv = random_qkv((4096, 4096), batch=2, heads=4, head_dim=32, dtype=torch.float32)
    return layout, [one.to("cuda", torch.bfloat16).requires_grad_() for one in qkv]


@pytest.mark.parametrize("learned", [False, True])
def test_the_same_bits_twice(learned):
    case = Case(lambda: Stencil(Grid(40, 40, prefix=1), 7), learned, ("table", "table"))
    layout = case.layout()
    given = random_qkv((1 if learned else layout.num_queries, 1601), batch=2, heads=4, head_dim=1, value_dim=32)
    tables = [torch.randn(4, 7, 7) for _ in range(2)]
    leaves = [one.to("cuda", torch.float32) for one in (*given, *tables)]
    first, second = (answers(case, layout, leaves, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("border", ["mask", "clamp"])
def test_chosen_for_stencils(border):
    _, given = large()
    with recording() as choices:
        attend(*given, Stencil(Grid(64, 64), 7, border=border))
    assert choices[0].backend == "triton"


def test_nothing_waits_for_the_gpu():
    layout, given = large()
    attend(*given, layout, backend="triton").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*given, layout, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_by_a_graph():
    layout, given = large()

    def step():
        out = attend(*given, layout, backend="triton")
        return (out, *torch.autograd.grad(out.sum(), given))

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


def test_compiled():
    layout, given = large()

    def step(q, k, v):
        return attend(q, k, v, layout, backend="triton")

    results = [
        (out := one(*given), *torch.autograd.grad(out.float().square().sum(), given))
        for one in (step, torch.compile(step, fullgraph=True))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_of_learned_queries(stride, autocast):
    layer = HeadMix(64, [LearnedQuery(8, 7, stride=stride)]).cuda()
    x = torch.randn(2, 30, 31, 64, device="cuda", requires_grad=True)
    found = []
    for backend in ("triton", "gather"):
        with use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = layer(x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0.0, atol=(2e-2 if autocast else 1e-4) * max(size, 1e-3))


@pytest.mark.parametrize("kernel", [3, 7, 15])
def test_memory_does_not_grow_with_the_window(kernel):
    layout = Stencil(Grid(64, 64), kernel)
    scores = torch.randn(4, 16, 4096, 1, device="cuda", requires_grad=True)
    v = torch.randn(4, 4096, 16, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    ones = torch.ones(1, 1, 1, 1, device="cuda").expand(4, 16, 4096, 1)

    def step():
        return torch.autograd.grad(attend(ones, scores, v, layout, backend="triton").float().sum(), [scores, v])

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    # Output, its gradient, both again in float32, gradients of scores and values, and three numbers a query.
    values = v.numel() * 2
    assert torch.cuda.max_memory_allocated() - before < 10 * values
