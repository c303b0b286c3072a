"""Stencils by Triton's interpreter: the kernels' arithmetic and addresses, without a GPU."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, attend
from attnkit.kernels import recording
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.triton.stencil import call, configs, sums
from attnkit.kernels.triton.stencil.configs import Config
from attnkit.kernels.triton.stencil.op import PAIR
from attnkit.layouts import Stencil
from attnkit.testing import random_qkv
from tests.kernels.triton.stencil_cases import CASES, OPERATORS, check, check_operator


@pytest.fixture(autouse=True)
def small_patches(monkeypatch):
    """So that a small problem has several, and columns that do not fill a tile."""
    monkeypatch.setattr(
        configs, "configuration", lambda direction, *_: Config(32 if "learned" in direction else 16, 32, 1, 1)
    )


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name):
    check(CASES[name], "cpu")


@pytest.mark.parametrize("name", OPERATORS)
def test_as_the_other_kernels_of_the_operator(name, monkeypatch):
    """Every argument of the operator in every form, against the kernels of the CPU in float64."""
    # Several tiles to a share, and a last share that is not full.
    monkeypatch.setattr(sums, "ROWS", 16)
    monkeypatch.setattr(sums, "PREFIXED", (16, 16))
    monkeypatch.setattr(call, "PROGRAMS", 1)
    check_operator(OPERATORS[name], PAIR, "cpu")


def test_chosen_by_name_only():
    with recording() as choices:
        attend(*random_qkv((16, 16), batch=1, heads=1, dtype=torch.float32), Stencil(Grid(4, 4), 3))
    assert choices[0].backend != "triton"
    assert "Triton interprets its kernels" in choices[0].reasons["triton"][0]


@pytest.mark.parametrize("learned", [False, True])
def test_no_items(learned):
    q, k, v = (one[:0].requires_grad_() for one in random_qkv((1 if learned else 16, 16), head_dim=1))
    q, k, v = (one.float().detach().requires_grad_(not learned or at > 0) for at, one in enumerate((q, k, v)))
    attend(q.expand(-1, -1, 16, -1), k, v, Stencil(Grid(4, 4), 3), backend="triton").sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("learned", [False, True])
def test_no_items_with_tables_of_their_own(learned):
    q, k, v = (one[:0].float().requires_grad_() for one in random_qkv((17, 17), head_dim=1))
    q = q[:, :, :1].expand(-1, -1, 17, -1) if learned else q
    bias = torch.zeros(0, 1, 1, 1, requires_grad=True)
    attend(q, k, v, Stencil(Grid(4, 4, prefix=1), 3), bias=bias, backend="triton").sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape
    assert bias.grad is not None and bias.grad.shape == bias.shape


def test_the_operators_of_the_cpu_stay_their_own():
    assert PAIR.op is not STENCIL.op
    given = random_qkv((16, 16), dtype=torch.float64)
    found, right = (attend(*given, Stencil(Grid(4, 4), 3), backend=one) for one in ("chunked", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("learned", [False, True])
def test_what_nobody_sees_matters_to_nobody(learned, poison):
    layout = Stencil(Grid(5, 6, prefix=1), 3).restrict(torch.arange(31) % 4 != 1)
    hidden = ~layout.key_mask[0, 0, :, None]
    q, k, v = random_qkv((1 if learned else 31, 31), batch=1, heads=2, head_dim=1, value_dim=4, dtype=torch.float32)
    found = []
    for filling in (0.0, poison):
        leaves = [one.masked_fill(hidden, filling).requires_grad_() for one in (k, v)]
        out = attend(q.expand(-1, -1, 31, -1), *leaves, layout, backend="triton")
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Stencil(Grid(4), 1, stride=2),
        Stencil(Grid(3, 7), 3, stride=(1, 4), border="clamp"),
        Stencil(Grid(7, 3), 3, stride=2, dilation=2),
    ],
    ids=["stride 2", "clamped", "dilated"],
)
def test_what_lies_between_windows_matters_to_nobody(layout, learned):
    hidden = ~layout.to_mask()[0, 0].any(0)[:, None]
    sizes = (1 if learned else layout.num_queries, layout.num_keys)
    q, k, v = random_qkv(sizes, heads=2, head_dim=1, value_dim=4, dtype=torch.float32)
    q = q.expand(-1, -1, layout.num_queries, -1) if learned else q.requires_grad_()
    found = []
    for filling in (0.0, torch.nan):
        leaves = [one.masked_fill(hidden, filling).requires_grad_() for one in (k, v)]
        out = attend(q, *leaves, layout, backend="triton")
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves if learned else [q, *leaves])])
    assert hidden.any()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and not one.isnan().any()
