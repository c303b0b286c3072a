"""Tuning by Triton's interpreter: every family goes through it, with times that the tests make up."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from attnkit.kernels.triton.launch import Launch
from attnkit.kernels.triton.table import Table
from attnkit_models.bench import results
from attnkit_models.bench.timing import Times
from attnkit_models.bench.tuning import stencil, workbench
from attnkit_models.bench.tuning.lines import configs_of, lines, table_of
from attnkit_models.bench.tuning.records import table
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Cut, Limits
from attnkit_models.bench.tuning.tuner import Session
from attnkit_models.bench.tuning.workbench import Workbench, put

DEVICE = "sm_90"
# What a pass writes, by the name its kernels have for it.
RESULTS = {"forward": "out", "query_gradient": "grad_q", "key_gradient": "grad_v"}


def small(device, images):
    return Room(device, 1, heads=1, side=4)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stencil, "KERNELS", {7: 3, 15: 5})


class Small(Workbench):
    """Nothing is compiled ahead of time where Triton interprets."""

    def fits(self, cut):
        return True


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tunes a line whose neighbours have half and twice the warps: of those with half, numbers are wrong."""
    put_back = []

    def run(name, seconds):
        line = lines(only=name)[0]
        used, family = table_of(line.family), workbench.family_of(line.family)
        start = Cut(*used.line(DEVICE, line.spot))
        wrong, good = (start._replace(warps=one) for one in (start.warps // 2, 2 * start.warps))
        path = tmp_path / "configs.json"
        path.write_text(used.path.read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(used, "path", path)
        before = used.own(DEVICE, line.spot)
        put_back.append((line, before))
        same = [(one, one) for one in start]
        limits = Limits(same[0], same[1], (wrong.warps, good.warps), same[3])
        monkeypatch.setattr(family, "limits", lambda line: limits)
        started = Launch.run

        def spoiled(launch):
            started(launch)
            target = launch.arguments.get(RESULTS[line.direction])
            if launch.warps == wrong.warps and target is not None:
                target.mul_(1.5)

        monkeypatch.setattr(Launch, "run", spoiled)
        asked = []

        def stand_in(turns, *_):
            asked.extend(turns)
            return {one: Times([seconds[Cut(*_numbers(one)).warps / start.warps]] * 3) for one in turns}

        monkeypatch.setattr(workbench, "interleaved", stand_in)
        told = []
        session = Session(
            torch.device("cpu"), DEVICE, told.append, tmp_path / "results", bench=partial(Small, room=small)
        )
        session.run([line])
        (found,) = (tmp_path / "results" / "tuning").glob(f"*-{line.family}.json")
        record = results.read(found)["cases"][0]
        assert str(wrong) not in asked and record["contenders"][str(wrong)]["why_not"].startswith("is WRONG: ")
        assert any(f"{wrong} is WRONG" in one for one in told)
        return line, start, good, record, path

    yield run
    for line, before in put_back:
        put(line, DEVICE, before)


def _numbers(cut):
    return [int(one.strip(" ws")) for part in cut.split(",") for one in part.split("x")]


@pytest.mark.parametrize(
    "name", ["blocks/forward/float32/16/32", "stencil/forward/float32/16/7", "token_sets/forward/float32/16"]
)
def test_what_is_faster_is_written_and_taken_and_what_is_wrong_never(tuned, name):
    line, start, good, record, path = tuned(name, {0.5: 0.1, 1: 1.0, 2: 0.8})
    assert record["facts"] | {"before": str(start), "after": str(good), "ratio": 0.8, "noise": 0.0} == record["facts"]
    assert Table(path).own(DEVICE, line.spot) == list(good)
    changed = json.loads(path.read_text(encoding="utf-8"))
    node = changed[DEVICE]
    for one in line.spot[:-1]:
        node = node[one]
    original = Table(configs_of(line.family).PATH)
    if original.own(DEVICE, line.spot) is None:
        del node[line.spot[-1]]
    else:
        node[line.spot[-1]] = original.own(DEVICE, line.spot)
    # Nothing else changed.
    assert _without_empty(changed) == json.loads(original.written())
    family = workbench.family_of(line.family)
    given = next(iter(family.scenes(line).values()))(small(torch.device("cpu"), 1))
    steps = family.forward(given, DEVICE).steps
    assert family.timed(line, steps)[-1].warps == good.warps
    assert f"| {good} | in the table | 800 ms |" in table(record)


@pytest.mark.parametrize(
    "name",
    ["blocks/key_gradient/float32/16/32", "stencil/query_gradient/float32/16/7", "token_sets/key_gradient/float32/16"],
)
def test_nothing_is_written_where_the_table_is_as_good(tuned, name):
    line, start, good, record, path = tuned(name, {0.5: 0.1, 1: 1.0, 2: 0.98})
    assert record["facts"]["before"] == record["facts"]["after"] == str(start)
    assert record["contenders"][str(good)]["passed"]
    assert path.read_bytes() == configs_of(line.family).PATH.read_bytes()
    assert table_of(line.family).own(DEVICE, line.spot) == Table(configs_of(line.family).PATH).own(DEVICE, line.spot)


@pytest.mark.parametrize("direction", ["learned_forward", "learned_gradient"])
def test_scenes_of_learned_queries_are_right(monkeypatch, direction):
    monkeypatch.setattr(workbench, "interleaved", lambda turns, *_: {one: Times([1.0]) for one in turns})
    line = lines(only=f"stencil/{direction}/float32/16/7")[0]
    told: list[str] = []
    bench = Workbench(line, torch.device("cpu"), DEVICE, 1, told.append, small)
    assert bench.seconds([Cut(8, 32, 4, 1)]) == {Cut(8, 32, 4, 1): 1.0} and not told


def _without_empty(one):
    if not isinstance(one, dict):
        return one
    return {name: found for name, inner in one.items() if (found := _without_empty(inner)) != {}}
