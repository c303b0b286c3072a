"""Token sets on a GPU, against float64: the cases of the interpreted tests, and what only a GPU tells."""

from __future__ import annotations

import pytest
import torch

from attnkit import attend
from attnkit.kernels import recording
from attnkit.kernels.ops.token_sets import TOKEN_SETS
from attnkit.testing import random_qkv
from tests.kernels.triton import token_set_cases as cases
from tests.kernels.triton.token_set_cases import CASES, answers_of_output, check

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name):
    check(CASES[name], "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("biased", [False, True])
def test_widths(width, biased, dtype):
    options = {"dtype": dtype, **({"bias": (1, 0, 0, 0)} if biased else {})}
    check(
        cases.Case(lambda: cases.lists(1, 2, rows=196, keys=197, slots=20, keys_all=1), (width, width), options), "cuda"
    )


@pytest.mark.parametrize("table", cases.TABLES)
@pytest.mark.parametrize("name", cases.ASKED)
def test_as_the_kernels_of_the_cpu(name, table):
    cases.check_operator(name, table, TOKEN_SETS, "cuda")


def test_marks_of_one_item_and_head_at_a_time(monkeypatch):
    from attnkit.kernels.triton.token_sets import listing

    monkeypatch.setattr(listing, "MARKS", 1)
    check(CASES["lists per item and head"], "cuda")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", cases.POISONED)
def test_what_nobody_sees_matters_to_nobody(name, poison, with_bias):
    cases.check_poisoned(cases.POISONED[name](), poison, with_bias, "cuda")


@pytest.mark.parametrize("size", [-1e9, 1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
def test_a_large_bias_hides_no_gradient(size):
    cases.check_large_bias(size, "cuda")


def large(dtype=torch.bfloat16, tokens=784):
    layout = cases.moved(cases.lists(2, 4, rows=tokens - 1, keys=tokens, slots=64, queries_all=1, keys_all=1), "cuda")
    given = random_qkv((tokens, tokens), batch=2, heads=4, head_dim=64, dtype=torch.float32)
    return layout, [one.to("cuda", dtype) for one in given]


@pytest.mark.parametrize("biased", [False, True])
def test_the_same_bits_twice(biased):
    """Also of a bias that all items and heads share, whose gradient a program adds up item after item."""
    layout, given = large()
    if biased:
        given.append(torch.randn(1, 1, 784, 784, device="cuda"))
    first, second = (answers_of_output(layout, given, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_chosen_for_lists_of_each_head():
    layout, given = large()
    with recording() as choices:
        attend(*given, layout)
        attend(
            *(one[:1].expand(32, -1, -1, -1) for one in given),
            cases.moved(cases.mask(1, 1, rows=784, keys=784), "cuda"),
        )
    assert [one.backend for one in choices] == ["triton", "sdpa"]
    assert "A mask that serves 128 items and heads" in choices[1].reasons["triton"][0]


def test_nothing_waits_for_the_gpu():
    layout, given = large()
    leaves = [one.requires_grad_() for one in given]
    attend(*leaves, layout, backend="triton").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*leaves, layout, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_by_a_graph():
    layout, given = large()
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


def test_compiled():
    layout, given = large()
    leaves = [one.requires_grad_() for one in given]

    def step(q, k, v):
        return attend(q, k, v, layout, backend="triton")

    compiled = torch.compile(step, fullgraph=True)
    results = [
        (out := one(*leaves), *torch.autograd.grad(out.float().square().sum(), leaves)) for one in (step, compiled)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_nothing_of_all_pairs_is_held_in_float32():
    """Lists take twelve bytes for a key and 64 queries, marks one byte a pair of so many heads as fit into 64 MiB."""
    from attnkit.kernels.triton.token_sets import listing

    tokens = 4096
    layout, given = large(tokens=tokens)
    attend(*given, layout, backend="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(*given, layout, backend="triton")
    pairs = 2 * 4 * tokens**2
    more = torch.cuda.max_memory_allocated() - before
    assert more < 1.1 * (pairs * 12 / 64 + listing.MARKS + 2 * given[0].numel()) + 2**20 < pairs * 4 / 8
