"""Lower precision, other memory layouts and autocast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import attend
from attnkit.kernels import recording
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.testing import (
    assert_within_budget,
    dense_attention,
    naive_attention,
    outputs_and_gradients,
    random_qkv,
    random_tensor,
)
from attnkit.testing.strategies import layout_cases, seeds

BACKENDS = ("reference", "sdpa", "gather")


def able(q, k, v, layout, **extra):
    call = AttendCall(q, k, v, layout, 1.0, **extra)
    return [backend for backend in BACKENDS if not backend_named(backend).why_not(call)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=layout_cases(), seed=seeds(), head_dim=st.integers(1, 16), with_bias=st.booleans())
def test_errors_stay_within_a_multiple_of_plain_attention(dtype, case, seed, head_dim, with_bias):
    layout, mask = case.layout, case.layout.to_mask()
    qkv = random_qkv(
        case.sizes, batch=case.batch, heads=case.heads, head_dim=head_dim, seed=seed, dtype=dtype, grad=True
    )
    bias = random_tensor(1, case.heads, *case.sizes, seed=seed, dtype=dtype) if with_bias else None
    exact = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, mask, bias=bias)[0], qkv)
    naive = outputs_and_gradients(lambda q, k, v: naive_attention(q, k, v, mask, bias=bias), qkv)
    scale = max(float(one.detach().abs().max()) for one in [*exact[0], *exact[1], *qkv])
    for backend in able(*qkv, layout, bias=bias):
        found = outputs_and_gradients(
            lambda q, k, v, backend=backend: attend(q, k, v, layout, bias=bias, backend=backend), qkv
        )
        assert found[0][0].dtype == dtype
        for at, what in enumerate(("out", "gradient of q", "gradient of k", "gradient of v")):
            actual, right, plain = ([*one[0], *one[1]][at] for one in (found, exact, naive))
            assert_within_budget(actual, right.double(), plain, multiple=8.0, scale=scale, what=f"{backend} {what}")


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


@given(
    case=layout_cases(), seed=seeds(), order=st.sampled_from(["heads last", "width first", "every other", "expanded"])
)
def test_any_memory_layout(case, seed, order):
    qkv = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)

    def arranged(one):
        if order == "heads last":
            return one.transpose(1, 2).contiguous().transpose(1, 2)
        if order == "width first":
            return one.mT.contiguous().mT
        if order == "every other":
            return one.repeat_interleave(2, dim=2)[:, :, ::2]
        return one[:1].expand_as(one)

    arranged_qkv = [arranged(one).requires_grad_() for one in qkv]
    plain = [one.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for one in arranged_qkv]
    mask = case.layout.to_mask()
    right = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, mask)[0], plain)
    for backend in able(*arranged_qkv, case.layout):
        found = outputs_and_gradients(
            lambda q, k, v, backend=backend: attend(q, k, v, case.layout, backend=backend), arranged_qkv
        )
        for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


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
