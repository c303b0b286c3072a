"""The gate: wrong numbers are told, and get no time."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from attnkit_models.bench import report, runner
from attnkit_models.bench.case import OURS, Setting
from attnkit_models.bench.gate import difference, passes, sampled_rows
from tests.bench.small import make_small, small_case

GATHER = "BiFormer gather"


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def spoilt(how: str, forward):
    def run():
        out = forward()
        if how == "value":
            return out * 1.001
        if how == "nan":
            return torch.cat([out[..., :5, :], out[..., 5:6, :] * math.nan, out[..., 6:, :]], dim=-2)
        if how == "order":
            return out.flip(2)
        return WrongGradient.apply(out)

    return run


def run_spoilt(monkeypatch, how: str, who: str, dtype=torch.float32):
    problem = make_small("regions", dtype)
    one = problem.contenders[who]
    problem.contenders[who] = replace(one, forward=spoilt(how, one.forward))
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    return runner.run_case(small_case("regions"), Setting(dtype=dtype))


@pytest.mark.parametrize("how", ["value", "nan", "order", "gradient"])
def test_a_wrong_contender_is_red_and_gets_no_number(monkeypatch, how):
    record = run_spoilt(monkeypatch, how, GATHER)
    wrong, right = record["contenders"][GATHER], record["contenders"][OURS]
    assert wrong["passed"] is False and right["passed"] is True
    assert set(wrong) == {"passed", "errors"}
    assert report.speed(record, GATHER, "forward") is None
    assert "**wrong**" in report.case_table(record)
    text = "\n".join(report.lines(small_case("regions"), record))
    assert "WRONG, so not timed" in text


def test_wrong_numbers_of_attnkit_leave_no_speed_up(monkeypatch):
    record = run_spoilt(monkeypatch, "value", OURS)
    assert record["contenders"][OURS]["passed"] is False
    assert record["contenders"][GATHER]["forward"]["min"] > 0
    for what in ("forward", "training", "memory forward"):
        assert report.speed(record, GATHER, what) is None
    assert report.efficiency(record, "forward") is None


def test_all_that_is_right_is_timed_and_weighed():
    record = runner.run_case(small_case("regions"), Setting())
    for name, one in record["contenders"].items():
        assert one["passed"], name
        assert one["forward"]["rounds"] >= 1 and one["forward"]["min"] <= one["forward"]["median"]
        assert one["training"]["min"] > 0 and one["memory training"] > one["memory forward"] > 0
    assert record["contenders"][OURS]["backends"]
    assert report.efficiency(record, "forward") == pytest.approx(
        record["density"] * report.speed(record, "dense SDPA", "forward")
    )


def test_timed_at_another_time_the_faster_counts_for_each():
    case = small_case("regions")
    record = runner.run_case(case, Setting())
    before = copy.deepcopy(record["contenders"])
    # As if attnkit had been disturbed, and the other had not.
    record["contenders"][OURS]["forward"]["min"] = 1500.0
    record["contenders"][GATHER]["forward"]["min"] /= 200
    fast = record["contenders"][GATHER]["forward"]["min"]
    assert runner.time_again(case, Setting(), record)["visits"] == 2
    ours, theirs = record["contenders"][OURS], record["contenders"][GATHER]
    assert ours["forward"]["min"] < 1500.0
    assert theirs["forward"]["min"] == fast
    assert all(one["forward"]["rounds"] > before[OURS]["forward"]["rounds"] for one in (ours, theirs))
    assert {name: ours[name] for name in ours if "memory" in name} == {
        name: one for name, one in before[OURS].items() if "memory" in name
    }


def test_wrong_contenders_get_no_time_later_and_long_passes_are_not_repeated(monkeypatch):
    record = run_spoilt(monkeypatch, "value", GATHER)
    runner.time_again(small_case("regions"), Setting(), record)
    assert record["visits"] == 2 and set(record["contenders"][GATHER]) == {"passed", "errors"}
    record["contenders"][OURS]["training"]["min"] = 3e3
    assert runner.time_again(small_case("regions"), Setting(), record)["visits"] == 2


def test_what_fails_while_it_is_checked_is_told(monkeypatch):
    def fail():
        raise RuntimeError("no kernel here\nand more")

    problem = make_small("windows", torch.float32)
    problem.contenders["gather + SDPA"] = replace(problem.contenders["gather + SDPA"], forward=fail)
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    record = runner.run_case(small_case("windows"), Setting())
    assert record["contenders"]["gather + SDPA"] == {"why_not": "RuntimeError: no kernel here"}


def test_a_pass_that_fails_after_the_gate_is_told_and_others_are_timed(monkeypatch):
    class CompilationError(Exception):
        """As Triton's, which is no RuntimeError."""

    def fail():
        raise CompilationError("out of resource: shared memory\nand more")

    problem = make_small("windows", torch.float32)
    problem.contenders["gather + SDPA"] = replace(problem.contenders["gather + SDPA"], step=fail)
    monkeypatch.setattr(runner, "make", lambda case, setting: problem)
    record = runner.run_case(small_case("windows"), Setting())
    failed = record["contenders"]["gather + SDPA"]
    assert failed["failed training"] == "CompilationError: out of resource: shared memory"
    assert "training" not in failed and failed["forward"]["min"] > 0
    assert record["contenders"][OURS]["training"]["min"] > 0
    assert "| failed |" in report.case_table(record)
    assert "- gather + SDPA: CompilationError" in report.peers_missing([record])


def test_other_keys_than_attnkits_are_red(monkeypatch):
    """A predictor that chooses other keys is wrong even where attention over its own keys is right."""
    from attnkit_models.bench import layer_problems

    exact = layer_problems.predicted_mask
    monkeypatch.setattr(layer_problems, "predicted_mask", lambda *given: exact(*given).roll(1, dims=-1))
    one = make_small("predicted_keys").contenders["authors' formulation"]
    assert one.check(one)["keys"] > 0.1


def test_errors_and_rows():
    exact = torch.tensor([1.0, -4.0])
    assert difference(exact + torch.tensor([0.0, 0.1]), exact) == pytest.approx(0.025)
    assert difference(torch.tensor([1.0, math.nan]), exact) == math.inf
    assert not passes({"output": math.nan}, torch.float32)
    assert not passes({"output": 1e-3}, torch.float32) and passes({"output": 1e-3}, torch.bfloat16)
    rows = sampled_rows(100, 7, torch.device("cpu"))
    assert rows[0] == 0 and rows[-1] == 99 and len(rows) == 7
    assert sampled_rows(3, 7, torch.device("cpu")).tolist() == [0, 1, 2]
