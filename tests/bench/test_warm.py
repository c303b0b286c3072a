"""Warm: what a first call compiles is in nobody's time, and decides nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from attnkit_models.bench import runner, warm
from attnkit_models.bench.case import Setting
from tests.bench.small import make_small, small_case

CPU = torch.device("cpu")
OTHER = "gather + SDPA"


def compiling(forward, cold: float, warmed: float):
    """A pass that compiles for a while, with gradients and without, and then takes its time."""
    compiled: set[bool] = set()

    def call():
        time.sleep(warmed if torch.is_grad_enabled() in compiled else cold)
        compiled.add(torch.is_grad_enabled())
        return forward()

    return call


@pytest.mark.parametrize("compiles", [True, False])
def test_a_long_first_call_is_in_no_time(monkeypatch, compiles):
    problem = make_small("windows", torch.float32)
    one = problem.contenders[OTHER]
    forward = compiling(one.forward, cold=1.5, warmed=0.005)
    problem.contenders = {OTHER: replace(one, forward=forward, check=None, compiles=compiles)}
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    record = runner.run_case(small_case("windows"), Setting())["contenders"][OTHER]
    for what in ("forward", "training"):
        assert record[what]["median"] < 100 and record[what]["rounds"] >= 1


def test_timed_again_a_first_call_does_not_count_either(monkeypatch):
    case = small_case("windows")
    record = runner.run_case(case, Setting())
    problem = make_small("windows", torch.float32)
    one = problem.contenders[OTHER]
    problem.contenders = {OTHER: replace(one, forward=compiling(one.forward, cold=1.0, warmed=0.0))}
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    record["contenders"][OTHER]["forward"]["min"] = record["contenders"][OTHER]["training"]["min"] = 900.0
    runner.time_again(case, Setting(), record)
    assert record["visits"] == 2
    assert all(record["contenders"][OTHER][what]["median"] < 100 for what in ("forward", "training"))


@pytest.mark.parametrize("grad", [False, True])
def test_the_variant_counts_that_is_the_fastest_when_warm(grad):
    one = make_small("windows", torch.float32).contenders[OTHER]
    variants = {
        "compiles long": compiling(one.forward, cold=0.7, warmed=0.0),
        "compiles fast": compiling(one.forward, cold=0.0, warmed=0.1),
    }
    # As the gate does, which has gradients on.
    variants["compiles long"]()
    assert warm.fastest_variant(replace(one, variants=variants), CPU, grad=grad)[1] == "compiles long"


def test_variants_that_do_not_run_are_none():
    def fail():
        raise RuntimeError("no kernel")

    one = replace(make_small("windows", torch.float32).contenders[OTHER], variants={"one": fail})
    assert warm.fastest_variant(one, CPU, grad=False) == (None, "")


def test_a_graph_has_times_and_no_memory(monkeypatch):
    problem = make_small("windows", torch.float32)
    problem.contenders = {OTHER: replace(problem.contenders[OTHER], keeps=True)}
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    record = runner.run_case(small_case("windows"), Setting())["contenders"][OTHER]
    assert record["forward"]["min"] > 0 and record["training"]["min"] > 0
    assert not [what for what in record if what.startswith("memory")]
