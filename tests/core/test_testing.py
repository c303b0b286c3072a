"""attnkit.testing itself: an oracle that is right, tolerances that mean something, and no need for Hypothesis."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnkit
from attnkit.errors import ConfigError
from attnkit.kernels import AttendCall
from attnkit.layouts import Dense as DenseLayout
from attnkit.testing import (
    assert_within_budget,
    dense_attention,
    error_budget,
    expected,
    naive_attention,
    outputs_and_gradients,
    random_options,
    random_qkv,
    random_tensor,
    randomize_parameters,
)
from attnkit.testing.strategies import layout_cases, primitive_options, seeds


@given(case=layout_cases(), seed=seeds(), with_bias=st.booleans(), with_gain=st.booleans())
def test_the_oracle_number_by_number(case, seed, with_bias, with_gain):
    """Against nothing but math.exp and loops, at one place of the output."""
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, head_dim=3, value_dim=2, seed=seed)
    full = (case.batch, case.heads, *case.sizes)
    bias = random_tensor(*full, seed=seed) if with_bias else None
    gain = random_tensor(*full, seed=seed + 1) if with_gain else None
    mask = case.layout.to_mask()
    out, lse = dense_attention(q, k, v, mask, 0.9, bias, gain)
    item, head, row = seed % case.batch, seed // 3 % case.heads, seed // 9 % case.sizes[0]
    seen = [key for key in range(case.sizes[1]) if mask.expand(full)[item, head, row, key]]
    raised = {}
    for key in seen:
        logit = 0.9 * sum(float(q[item, head, row, at] * k[item, head, key, at]) for at in range(3))
        raised[key] = math.exp(logit + (float(bias[item, head, row, key]) if with_bias else 0.0))
    total = sum(raised.values())
    for channel in range(2):
        parts = [
            (float(gain[item, head, row, key]) if with_gain else 1.0)
            * raised[key]
            / total
            * float(v[item, head, key, channel])
            for key in seen
        ]
        assert abs(float(out[item, head, row, channel]) - sum(parts)) < 1e-10
    assert float(lse[item, head, row]) == pytest.approx(math.log(total) if seen else -math.inf)


def test_the_oracle_has_the_right_gradient():
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = False
    q, k, v = random_qkv((3, 4), grad=True)
    bias, gain = (random_tensor(1, 1, 3, 4, seed=seed, grad=True) for seed in (5, 6))
    assert torch.autograd.gradcheck(
        lambda *one: dense_attention(*one[:3], mask, None, *one[3:])[0], (q, k, v, bias, gain)
    )


def test_a_row_that_sees_nothing_gives_zero_with_zero_gradient():
    q, k, v = random_qkv((2, 3), grad=True)
    mask = torch.tensor([[False, False, False], [True, False, True]])
    out, lse = dense_attention(q, k, v, mask)
    assert (out[..., 0, :] == 0).all()
    assert lse[..., 0].item() == -torch.inf
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][..., 0, :] == 0).all()
    assert (gradients[2][..., 1, :] == 0).all()


def test_expected_ignores_what_nobody_sees():
    q, k, v = random_qkv((3, 4))
    kept = torch.tensor([True, True, False, True])
    right = expected(AttendCall(q, k, v, DenseLayout(3, 4).restrict(kept), 0.5))[0]
    v[:, :, 2] = torch.nan
    found = expected(AttendCall(q, k, v, DenseLayout(3, 4).restrict(kept), 0.5))[0]
    assert torch.equal(found, right)


@given(case=layout_cases(), seed=seeds())
def test_naive_attention_in_float64_is_the_oracle(case, seed):
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)
    mask = case.layout.to_mask()
    torch.testing.assert_close(
        naive_attention(q, k, v, mask), dense_attention(q, k, v, mask)[0], rtol=1e-12, atol=1e-12
    )


def test_budgets_follow_the_data():
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    rounded = exact.float()
    assert error_budget(rounded, exact) == 4.0 * torch.finfo(torch.float32).eps * 100.0
    assert error_budget(rounded + 0.01, exact) == pytest.approx(0.04, rel=1e-3)
    assert error_budget(rounded, exact, multiple=2.0, scale=1.0) == 2.0 * torch.finfo(torch.float32).eps
    assert error_budget(rounded[:0], exact[:0]) == 0.0
    assert_within_budget(rounded + 0.03, exact, rounded + 0.01)
    with pytest.raises(
        AssertionError, match=r"sums is off by 0\.05.*allowed are 0\.04, 4 times what plain torch\.float32"
    ):
        assert_within_budget(rounded + 0.05, exact, rounded + 0.01, what="sums")
    with pytest.raises(AssertionError, match=r"has shape \(1,\) instead of \(2,\)"):
        assert_within_budget(rounded[:1], exact, rounded)
    with pytest.raises(AssertionError, match="is off by nan"):
        assert_within_budget(rounded * torch.nan, exact, rounded)


def test_outputs_and_gradients():
    x, unused = random_tensor(3, seed=0, grad=True), random_tensor(2, seed=1, grad=True)
    outputs, gradients = outputs_and_gradients(lambda x, _: (2 * x, x.log()), [x, unused], seed=4)
    weights = [random_tensor(3, seed=4 + 7919 * at) for at in (1, 2)]
    finite = x > 0
    right = 2 * weights[0] + torch.where(finite, weights[1] / x, 0.0)
    torch.testing.assert_close(gradients[0][finite], right[finite].detach())
    assert (gradients[1] == 0).all()
    assert not any(one.requires_grad for one in outputs)


def test_randomized_parameters_are_all_active():
    module = randomize_parameters(torch.nn.LayerNorm(50), seed=1, scale=2.0)
    assert 1.0 < float(module.bias.detach().std()) < 3.0
    again = randomize_parameters(torch.nn.LayerNorm(50), seed=1, scale=2.0)
    assert torch.equal(module.weight, again.weight)
    assert not torch.equal(module.weight, module.bias)


@given(options=primitive_options())
def test_random_options_are_options(options):
    assert type(options).from_dict(options.to_dict()) == options


def test_random_options_can_be_fixed():
    assert random_options("window", seed=3, heads=7, window=2).heads == 7
    assert random_options("window", seed=3) == random_options("window", seed=3)
    with pytest.raises(ConfigError, match="were accepted in"):
        random_options("window", heads=0)
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        random_options("windoww")


def test_hypothesis_is_only_needed_for_strategies():
    code = """
import sys
import attnkit.testing
assert "hypothesis" not in sys.modules
attnkit.testing.random_layout("blocks", attnkit.Grid(3, 4), batch=2, heads=2, seed=1)
assert "hypothesis" not in sys.modules
sys.modules["hypothesis"] = None
try:
    attnkit.testing.check_primitive(attnkit.Dense(2))
except attnkit.AttnkitError as error:
    assert "pip install 'attnkit[testing]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(attnkit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
