"""Lower precision, other memory layouts and autocast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attnkit import attend
from attnkit.kernels import recording
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.kernels.precision import without_autocast
from attnkit.testing import (
    assert_within_budget,
    dense_attention,
    naive_attention,
    random_qkv,
)
from attnkit.testing.strategies import layout_cases, seeds

BACKENDS = ("reference", "sdpa", "chunked", "gather")


def able(q, k, v, layout, **extra):
    call = AttendCall(q, k, v, layout, 1.0, **extra)
    return [backend for backend in BACKENDS if not backend_named(backend).why_not(call)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@given(case=layout_cases(), seed=seeds())
def test_values_may_have_another_dtype(dtype, case, seed):
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed, dtype=torch.float32)
    v = v.to(dtype)
    exact = dense_attention(q, k, v, case.layout.to_mask())[0]
    assert "sdpa" not in able(q, k, v, case.layout)
    for backend in able(q, k, v, case.layout):
        out = attend(q, k, v, case.layout, backend=backend)
        assert out.dtype == dtype
        plain = naive_attention(
            *(one.to(torch.bfloat16 if dtype != torch.float64 else q.dtype) for one in (q, k, v)), case.layout.to_mask()
        )
        assert_within_budget(out, exact, plain, what=backend)


@given(case=layout_cases(), seed=seeds())
def test_autocast_leaves_the_dtype_of_the_inputs(case, seed):
    qkv = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed, dtype=torch.float32)
    for backend in able(*qkv, case.layout):
        outside = attend(*qkv, case.layout, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            inside = attend(*qkv, case.layout, backend=backend)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside), backend


def test_logits_in_half_precision_are_computed_in_single():
    """Near 10,000 bfloat16 counts in steps of 64 and float16 in steps of 8: too coarse for a softmax."""
    from attnkit.layouts import Dense

    layout, steps = Dense(1, 8), torch.arange(8.0)
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.ones(1, 1, 1, 2, dtype=dtype)
        k = torch.stack([torch.full((8,), 1e4), steps], dim=-1).to(dtype)[None, None]
        v = torch.eye(8, dtype=dtype)[None, None]
        out = attend(q, k, v, layout, scale=1.0, backend="reference")
        torch.testing.assert_close(out[0, 0, 0].float(), steps.softmax(0), atol=5e-3, rtol=0)


def test_recorded_calls_keep_their_inputs():
    from attnkit.layouts import Dense

    q, k, v = random_qkv((3, 4))
    with recording() as choices:
        attend(q, k, v, Dense(3, 4), scale=0.5)
    assert [choice.call.scale for choice in choices] == [0.5]
    assert choices[0].call.q is q


def test_without_autocast_is_off_inside_and_as_before_behind():
    cpu, one = torch.device("cpu"), torch.ones(2, 2)
    with without_autocast(cpu):
        assert (one @ one).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            with without_autocast(cpu):
                assert (one @ one).dtype == torch.float32
            assert (one @ one).dtype == dtype


def test_graphs_hold_that_autocast_is_off():
    """Whether it is on is asked while tracing; what torch.export writes may run where it is on."""

    class Products(torch.nn.Module):
        def forward(self, one):
            with without_autocast(one.device):
                return one @ one

    one = torch.ones(2, 2)
    exported = torch.export.export(Products(), (one,)).module()
    compiled = torch.compile(Products(), backend="eager", fullgraph=True)
    for run in (exported, compiled):
        assert run(one).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert run(one).dtype == torch.float32
