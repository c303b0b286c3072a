"""The constants behind the automatic choice follow from committed measurements, and choose well by them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from attnkit.kernels import costs
from attnkit.kernels.costs import Work, predicted
from attnkit_models.bench.calibration.fit import counted, fit
from attnkit_models.bench.calibration.measure import points
from attnkit_models.bench.calibration.problems import PROBLEMS

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "calibration.json").read_text(encoding="utf-8"))
POINTS = MEASURED["points"]
STALE = "python benchmarks/calibrate.py --fit makes the constants anew"


def prediction(point, name):
    return predicted(Work(*point["work"][name]), point["mode"]) / 1e3


def test_the_constants_follow_from_the_measurements():
    found = fit(POINTS)
    known = costs.constants()
    assert set(found) == set(known), STALE
    for mode, kernels in found.items():
        assert set(kernels) == set(known[mode]), STALE
        for kernel, rates in kernels.items():
            assert rates == pytest.approx(known[mode][kernel], rel=2e-2, abs=1e-13), (mode, kernel, STALE)


def test_the_work_is_counted_as_the_backends_count_it():
    small = [problem for problem in PROBLEMS if problem.side <= 14]
    names = {problem.name for problem in small}
    known = copy.deepcopy([point for point in POINTS if point["problem"] in names])
    again = counted(known, small)
    assert len(again) == len(known) > 40
    for now, before in zip(again, known, strict=True):
        if now["call"] == "around":
            # Tests fill new memory with NaN, which is an operator more.
            for one in (now["work"]["around"][1], before["work"]["around"][1]):
                del one["operators"], one["bytes"]
        assert now == before, STALE


def test_all_problems_were_measured():
    assert {point["problem"] for point in POINTS} == {problem.name for problem in PROBLEMS}


def test_the_choice_is_near_the_best_that_was_measured():
    losses = []
    for point in POINTS:
        seconds = {name: one for name, one in point["seconds"].items() if name != "around"}
        if len(seconds) > 1:
            chosen = min(seconds, key=lambda name: prediction(point, name))
            losses.append(seconds[chosen] / min(seconds.values()))
    losses.sort()
    assert len(losses) > 150
    # What docs/concepts/dispatch.md says.
    assert losses[int(6 / 7 * len(losses))] == 1.0
    assert losses[int(0.9 * len(losses))] < 1.01
    assert losses[-1] < 1.82


def test_predictions_are_near_the_measurements():
    ratios = sorted(prediction(point, name) / one for point in POINTS for name, one in point["seconds"].items())
    inside = [ratio for ratio in ratios if 1 / 2 < ratio < 2]
    assert len(inside) > 0.94 * len(ratios)


def test_a_fit_finds_the_constants_that_made_the_numbers():
    made = []
    for calls, pairs in ((1.0, 10.0), (1.0, 1e4), (1.0, 1e6)):
        work = {"a": ["one", {"calls": calls, "pairs": pairs}]}
        made.append({"mode": "m", "seconds": {"a": 1e-5 * calls + 2e-9 * pairs}, "work": work})
    assert fit(made) == {"m": {"one": {"calls": pytest.approx(1e-5), "pairs": pytest.approx(2e-9)}}}


def test_a_problem_is_measured_on_all_backends_that_can():
    found = list(points(PROBLEMS[0], torch.float32, grad=True, seconds=0.01))
    assert [point["call"] for point in found] == [0, "around"]
    assert set(found[0]["seconds"]) == {"sdpa", "reference"} and set(found[1]["seconds"]) == {"around"}
    assert all(0 < one < 10 for point in found for one in point["seconds"].values())
