"""Cases as data: they fit the functions that make them ready, and promise nothing about who is not there."""

from __future__ import annotations

import inspect

import pytest
import torch

from attnkit.errors import ConfigError
from attnkit.registry import RECIPES, load
from attnkit_models.bench.kinds import KINDS, chosen
from attnkit_models.bench.report import WHAT
from attnkit_models.bench.runner import PROBLEMS
from attnkit_models.bench.sweeps import NAMES, SWEEPS
from attnkit_models.bench.timing import Times, fastest_of, interleaved
from tests.bench.small import SMALL, make_small

CASES = [case for cases in KINDS.values() for case in cases]


def test_names_are_unique_and_told_apart():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.title for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_fit_the_problem(case):
    inspect.signature(load(PROBLEMS[case.problem])).bind(None, **case.sizes)
    if "regions" in case.sizes:
        assert case.sizes["side"] % case.sizes["regions"] == 0
        assert 1 <= case.sizes["topk"] <= case.sizes["regions"] ** 2


@pytest.mark.parametrize("problem", SMALL)
def test_targets_are_about_contenders_that_exist(problem):
    there = set(make_small(problem, torch.float32).contenders)
    for case in CASES:
        # Those of a GPU are looked at with their own sizes.
        for target in case.targets if case.problem == problem and case.device == "cpu" else ():
            assert target.against in there
            assert target.measure in WHAT
            assert not target.case or target.case in {one.name for one in CASES}


def test_every_row_of_the_promised_table_is_there():
    headline = {case.name for case in KINDS["headline"]}
    assert headline >= {f"learned_query/64x64/k{kernel}" for kernel in (3, 5, 7, 9, 11, 13, 15)}
    assert headline >= {"regions/128x128", "regions/256x256", "regions/56x56", "predicted_keys/3136"}
    assert headline >= {"windows/56x56", "windows/128x128", "model/biformer_tiny/512"}
    assert all(case.targets for case in KINDS["headline"])


def test_models_are_recipes():
    assert {name.partition(" on ")[0] for name in NAMES} <= set(RECIPES)


def test_sweeps_change_one_number():
    for sweep in SWEEPS:
        problem = sweep.cases[0].problem
        assert len(sweep.cases) >= 2
        assert {case.problem for case in sweep.cases} == {problem}
        assert sweep.axis in make_small(problem, torch.float32).facts


def test_choosing():
    assert list(chosen(None, None)) == ["headline"]
    assert list(chosen("all", None)) == ["headline", "sweeps", "models"]
    assert list(chosen("all", None, gpu=True)) == list(KINDS)
    assert [case.name for case in chosen(None, "regions/*")["headline"]] == [
        "regions/128x128",
        "regions/256x256",
        "regions/56x56",
    ]
    assert list(chosen(None, "topk")) == ["sweeps"]
    assert [case.name for case in chosen("sweeps", "keep/0.25")["sweeps"]] == ["keep/0.25"]
    with pytest.raises(ConfigError, match="did you mean 'sweeps'"):
        chosen("sweep", None)
    with pytest.raises(ConfigError, match="did you mean 'windows/56x56'"):
        chosen(None, "window/56x56")
    with pytest.raises(ConfigError, match=r"'keep/0.25' names no case of headline but 1 of sweeps: `attnkit bench sw"):
        chosen("headline", "keep/0.25")
    with pytest.raises(ConfigError, match=r"no case is named 'kep'; did you mean 'keep'.*bench sweeps --list` prints"):
        chosen("sweeps", "kep")


def test_contenders_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved(runs, 0.05, torch.device("cpu"))
    assert all(one.record()["rounds"] >= 3 for one in times.values())
    turns = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert "".join(turns).startswith("abababab")
    record = next(iter(times.values())).record(16)
    assert record["min"] <= record["median"]


def test_of_many_rounds_as_many_count_as_of_few():
    times = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert fastest_of(times, 6) == 1.0
    # Two at a time: 5 and 2, 1 and 3, 4 and 6.
    assert fastest_of(times, 2) == 2.0
    assert fastest_of(times, 1) == 3.0
    # What is left over counts for nothing.
    assert fastest_of([3.0, 2.0, 1.0], 2) == 2.0
    assert Times(times).record(2.0, 1) == {"min": 6e3, "median": 7e3, "rounds": 6}
