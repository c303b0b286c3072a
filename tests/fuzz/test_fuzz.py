"""The short version of the sweep, and that the sweep would find what it looks for."""

from __future__ import annotations

import copy
import pickle
import re
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import attnkit.heads
import attnkit.options
from attnkit_models.train import checkpoint, plaindata
from tests.fuzz import agreement, checkpoints
from tests.fuzz.case import KINDS, run_case
from tests.fuzz.limits import OutOfTime, limited
from tests.fuzz.record import BEGIN, END, write_record
from tests.fuzz.sweep import PATIENCE, Worker, main, share_out

PAGE = Path(__file__).parents[2] / "docs" / "fuzzing.md"
# Few enough that all of them together take some seconds; the second command trains, which alone takes that long.
SHORT = {
    "mixes": range(10),
    "recipes": range(7),
    "options": range(40),
    "layouts": range(60),
    "configs": range(40),
    "checkpoints": range(20),
    "official": range(4),
    "files": range(60),
    "images": range(30),
    "calls": range(25),
    "commands": range(2, 20),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_or_is_refused(kind):
    results = [run_case(kind, seed) for seed in SHORT[kind]]
    assert not [f"{one.command}: {one.detail}" for one in results if one.outcome == "finding"]
    assert {one.outcome for one in results} == {"worked", "refused"}


def found(kind, text, *, cases=300):
    """Whether one of many cases is a finding of which the text is part; it stops at the first."""
    results = (run_case(kind, seed) for seed in range(cases))
    return any(one.outcome == "finding" and text in one.detail for one in results)


def test_a_case_is_a_function_of_its_kind_and_seed():
    for kind in ("options", "layouts", "images"):
        assert [run_case(kind, seed).outcome for seed in range(8)] == [
            run_case(kind, seed).outcome for seed in range(8)
        ]


def test_an_exception_outside_of_the_family_is_found(monkeypatch):
    def broken(given, options, required, label):
        return [{}[name] for name in given if name not in options], {}

    monkeypatch.setattr(attnkit.options, "name_mistakes", broken)
    assert found("options", "KeyError: ")


def test_an_evaluation_that_differs_from_itself_is_found(monkeypatch):
    run = attnkit.heads.HeadMix.run

    def wavering(self, *args, **kwargs):
        found = run(self, *args, **kwargs)
        object.__setattr__(found, "x", found.x + 1e-3 * torch.randn_like(found.x))
        return found

    monkeypatch.setattr(attnkit.heads.HeadMix, "run", wavering)
    assert found("mixes", "evaluation changed the global random state", cases=50)


def test_state_that_is_forgotten_is_found(monkeypatch):
    load = checkpoint.load_weights

    def forgetful(model, weights, *, source):
        first = next(iter(weights))
        load(model, {**weights, first: torch.zeros_like(weights[first])}, source=source)

    monkeypatch.setattr(agreement, "load_weights", forgetful)
    assert found("mixes", "a loaded module differs from the saved one", cases=50)


def only(monkeypatch, name):
    """Lets the cases of checkpoints try nothing else."""
    monkeypatch.setattr(checkpoints, "WAYS", [one for one in checkpoints.WAYS if one.__name__ == name])


def test_half_loaded_weights_are_found(monkeypatch):
    def eager(model, weights, *, source):
        model.load_state_dict(dict(weights), strict=False)
        checkpoint.check_weights(model, weights, source=source)

    only(monkeypatch, "_load")
    assert not found("checkpoints", "", cases=15)
    monkeypatch.setattr(checkpoints, "load_weights", eager)
    assert found("checkpoints", "weights that were refused were loaded in part")


def test_a_pickle_that_is_opened_is_found(monkeypatch):
    def trusting(path):
        return pickle.loads(path.read_bytes())

    only(monkeypatch, "_pickle")
    assert not found("checkpoints", "", cases=15)
    monkeypatch.setattr(checkpoints, "read_weights", trusting)
    assert found("checkpoints", "executed what stands in it")


def test_a_checkpoint_file_that_is_executed_is_found(monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    assert found("files", "executed what stands in it")


def test_a_configuration_that_is_executed_is_found(monkeypatch):
    monkeypatch.setattr(plaindata, "_Loader", yaml.UnsafeLoader)
    assert found("configs", "executed what stands in it")


def test_what_asks_for_too_much_is_ended():
    with pytest.raises(OutOfTime, match=r"more than 0\.1 s"), limited(seconds=0.1):
        while True:
            pass
    with pytest.raises((MemoryError, RuntimeError), match="allocate"), limited(megabytes=50):
        torch.ones(100, 2**20)
    assert torch.ones(100, 2**20).shape == (100, 2**20)


def worker(*, begun):
    """A worker at a case whose process has ended."""
    ours, theirs = Pipe()
    theirs.close()
    found = object.__new__(Worker)
    found.pipe, found.case, found.begun, found.dead = ours, ("mixes", 3), begun, False
    found.process = SimpleNamespace(join=lambda: None, exitcode=-9)
    return found


def test_a_case_that_takes_its_process_with_it_or_hangs_is_a_finding():
    dead = worker(begun=time.monotonic())
    assert dead.result(ready=False) is None and not dead.dead
    assert dead.result(ready=True).detail == "the process died with status -9" and dead.dead
    hung = worker(begun=time.monotonic() - PATIENCE - 1).result(ready=False)
    assert (hung.command, hung.outcome) == ("python -m tests.fuzz mixes --seed 3", "finding")
    assert "no alarm could end it" in hung.detail


def test_all_cases_are_shared_out():
    for cases in (1, 17, 2_000):
        counts = share_out(cases, list(KINDS))
        assert sum(counts.values()) == cases and counts.keys() == KINDS.keys()
    assert share_out(7, ["mixes"]) == {"mixes": 7}


def test_one_case_from_the_command_line(capsys):
    assert main(["layouts", "--seed", "0"]) == 0
    assert re.match(r"python -m tests.fuzz layouts --seed 0: (worked|refused)", capsys.readouterr().out)


def test_the_record_replaces_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results = [run_case("layouts", seed) for seed in range(3)]
    text = write_record(results, start=0, seconds=60, page=page)
    assert page.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    again = write_record(copy.copy(results), start=0, seconds=60, page=page)
    assert again == text and page.read_text().count("| layouts | 0 to 2 |") == 1


def test_the_documented_sweep_found_nothing_and_was_not_tame():
    rows = re.findall(
        r"^\| (\w+) \|[^|]*\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    counts = {kind: [int(one.replace(",", "")) for one in numbers] for kind, *numbers in rows}
    total = counts.pop("all")
    assert list(counts) == list(KINDS) and [sum(column) for column in zip(*counts.values(), strict=True)] == total
    worked, refused, found = total
    assert found == 0 and sum(total) >= 2_000
    assert worked >= 0.4 * sum(total) and refused >= 0.2 * sum(total)
    for numbers in counts.values():
        assert min(numbers[:2]) >= 0.2 * sum(numbers)
