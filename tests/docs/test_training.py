"""The tables of trainings: what pages show is what lies beside them, and how it was made is what they say."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from attnkit_models.train.options import TrainOptions

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("training_page", DOCS / "generate" / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def numbers(training):
    return json.loads(training.NUMBERS.read_text(encoding="utf-8"))


def test_the_pages_show_the_numbers(training, numbers):
    assert training.shown(training.README) == training.demo_table(numbers)
    assert training.shown(training.PAGE) == training.sparse_table(numbers)


def test_every_run_is_there(training, numbers):
    found = [one["run"] for one in numbers["runs"] if one["model"] != "vit_micro"]
    assert found == list(training.RUNS) and numbers["seed"] == training.SEED
    fresh = [(one["keep"], one["seed"]) for one in numbers["untrained predictors"]]
    assert fresh == [(keep, seed) for keep in training.KEEPS for seed in training.FRESH]


def test_accuracies_are_of_so_many_images(numbers):
    for one in [*numbers["runs"], *numbers["untrained predictors"]]:
        right = one["accuracy"] * numbers["test images"]
        assert right == pytest.approx(round(right), abs=0.01)
        assert 0 < one["accuracy"] <= one.get("best", 1.0) <= 1


def commands(path: Path) -> list[list[str]]:
    """What the trainings in a text ask for, without the folder they write to."""
    found = []
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.strip("\t @").partition(" ")[0] in ("attnkit", "$(BIN)/attnkit") and "--out" in line:
            words = [word for word in shlex.split(line)[2:] if word not in ("--overwrite", "$(ARGS)")]
            at = words.index("--out")
            found.append(words[:at] + words[at + 2 :])
    return found


@pytest.mark.parametrize("name", ["demo", "teacher", "sparse", "sparser"])
def test_the_commands_are_those_that_users_are_told(training, name):
    given = training.arguments(name, Path("runs"))
    # The seed that is there without asking.
    assert given[-4:] == ["--seed", str(TrainOptions.seed), "--out", f"runs/{name}"]
    given = given[:-4]
    assert given in commands(training.PAGE)
    assert name == "sparser" or given in commands(DOCS.parent / "Makefile")


def test_a_finished_run_is_read(training, tmp_path):
    def row(model, **more):
        costs = {"parameters": 5, "macs": 60, "attention_macs": 7}
        return {"model": model, "val_accuracy": 0.75, "best_val_accuracy": 0.9, "best_epoch": None, **costs, **more}

    rows = [row("vit (teacher)"), row("sparsifiner", best_epoch=3)]
    (tmp_path / "comparison.json").write_text(json.dumps(rows))
    accuracies = {"reconstruction": [0.2, 0.8], "distillation": [0.9, 0.6, 0.75]}
    lines = [{"phase": phase, "val_accuracy": one} for phase, some in accuracies.items() for one in some]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = training.read("sparse", tmp_path)
    assert (found["run"], found["model"], found["epochs"]) == ("sparse", "sparsifiner", 5)
    assert (found["accuracy"], found["best"], found["best epoch"], found["head group macs"]) == (0.75, 0.9, 3, 7)
    assert (found["after reconstruction"], found["least in distillation"]) == (0.8, 0.6)
