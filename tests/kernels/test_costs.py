"""Predicted times: counts of work times measured constants, from metadata only."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid
from attnkit.kernels import AttendCall, costs
from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.costs import Work, mode_of, predicted, written
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, Dense, Stencil, TokenSets
from attnkit.registry import BACKENDS
from attnkit.testing import random_qkv

GRID = Grid(8, 8)
LAYOUTS = {
    "dense": Dense(64),
    "windows": Blocks.windows(GRID, 4),
    "stencil": Stencil(GRID, 3),
    "clamped": Stencil(GRID, 3, border="clamp"),
    "sets": TokenSets(torch.arange(64).view(1, 1, 64, 1).expand(1, 1, 64, 5).clone(), keys=64),
}


def call(layout, *, grad=False, batch=1, dtype=torch.float32, device="cpu"):
    q, k, v = (torch.empty(batch, 2, 64, 8, dtype=dtype, device=device, requires_grad=grad) for _ in range(3))
    return AttendCall(q, k, v, layout, 1.0)


def backends(one):
    named = [backend_named(name) for name, target in BACKENDS.items() if target]
    return [one_backend for one_backend in named if not one_backend.why_not(one)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_backend_that_can_has_a_price(kind, dtype, grad):
    for backend in backends(call(LAYOUTS[kind], dtype=dtype, grad=grad)):
        assert isinstance(backend, MeasuredBackend)
        cost = backend.cost(call(LAYOUTS[kind], dtype=dtype, grad=grad))
        assert 0 < cost < 1e3
        # What is done once for all images is shared by them.
        one, three = (call(LAYOUTS[kind], dtype=dtype, grad=grad, batch=batch) for batch in (1, 3))
        assert cost / 3 <= backend.cost(three) * 1.001 and backend.cost(three) <= cost
        # Of the work, whatever a call costs by its constants.
        assert backend.work(three).counts["calls"] == pytest.approx(backend.work(one).counts["calls"] / 3)


def test_every_kernel_has_its_constants_and_no_other():
    known = costs.constants()["float32 inference"]
    for layout in LAYOUTS.values():
        for backend in backends(call(layout)):
            work = backend.work(call(layout))
            assert set(known[work.kernel]) == set(work.counts)
    for mode, kernels in costs.constants().items():
        assert all(rate >= 0 for rates in kernels.values() for rate in rates.values()), mode
        assert all(sum(rates.values()) > 0 for rates in kernels.values()), mode


def test_a_prediction_is_the_sum_of_counts_times_seconds(monkeypatch):
    known = {
        "float32 inference": {"one": {"calls": 1e-3, "pairs": 1e-6}},
        "bfloat16 training": {"one": {"calls": 0.0, "pairs": 1.0}},
    }
    monkeypatch.setattr(costs, "constants", lambda: known)
    work = Work("one", {"calls": 2.0, "pairs": 500.0})
    assert predicted(work, "float32 inference") == pytest.approx(2.5)
    assert predicted(work, "bfloat16 training") == pytest.approx(5e5)


def test_a_kernel_without_constants_of_its_own_is_judged_in_float32_without_gradients(monkeypatch):
    monkeypatch.setattr(
        costs, "constants", lambda: {"float32 inference": {"one": {"calls": 1.0}}, "float32 training": {}}
    )
    assert predicted(Work("one", {"calls": 1.0}), "float32 training") == 1e3


def test_modes():
    assert mode_of(torch.float32, grad=False) == "float32 inference"
    assert mode_of(torch.bfloat16, grad=True) == "bfloat16 training"
    assert mode_of(torch.float16, grad=True) == "float32 training"


def test_masks_and_biases_are_counted_where_all_pairs_are_computed():
    sdpa = backend_named("sdpa")
    q, k, v = random_qkv((64, 64), heads=2)
    bias = torch.zeros(1, 1, 64, 64)
    plain, masked, biased, both = (
        sdpa.work(AttendCall(q, k, v, layout, 1.0, bias=given))
        for layout, given in (
            (Dense(64), None),
            (LAYOUTS["windows"], None),
            (Dense(64), bias),
            (LAYOUTS["windows"], bias),
        )
    )
    assert plain.counts["mask"] == 0 and masked.counts["mask"] == 64 * 64
    assert biased.counts["mask"] == 2 * 64 * 64 and both.counts["mask"] == 3 * 64 * 64
    assert plain.kernel != masked.kernel == biased.kernel


@pytest.mark.parametrize(("number", "text"), [(0.0341, "0.034"), (1.234, "1.2"), (340.4, "340"), (12.3, "12")])
def test_milliseconds_are_written_with_two_digits(number, text):
    assert written(number) == text
