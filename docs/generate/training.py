"""Trains what README.md and docs/training.md show, and renews their tables, docs/tables/training.json and two pictures.

Run it from the repository root: python docs/generate/training.py [FOLDER]

FOLDER is for the runs, runs/measured where it is not given. Those that lie there finished are read, interrupted ones go
on, and one that was started with other options is an error. All of them take a quarter of an hour on one quiet core.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnkit
from attnkit_models.bench.machine import processor
from attnkit_models.train.data import digits
from attnkit_models.train.sparsifying import Sparsifying
from attnkit_models.train.sparsifying_options import RECONSTRUCTION, SparsifyingOptions
from attnkit_models.train.teacher import Teacher, load_teacher

DOCS = Path(__file__).parents[1]
NUMBERS = DOCS / "tables" / "training.json"
README, PAGE = DOCS.parent / "README.md", DOCS / "training.md"
BEGIN, END = "<!-- table: docs/generate/training.py -->", "<!-- end of the table -->"
AFTER, LEAST = "after reconstruction", "least in distillation"
THREADS = 1
SEED = 0
# Of predictors that have learned nothing.
FRESH = (0, 1, 2)
KEEPS = (0.25, 0.1)
SPARSE = ("--recipe", "sparsifiner", "--teacher", "{runs}/teacher")
SPARSER = (*SPARSE, "--set", "mix.groups[0].keep=0.1", "--set", "recipe.reconstruction_epochs=5")
# What each run is called, and what the command line says. A teacher comes before those that learn from it.
RUNS: dict[str, tuple[str, ...]] = {
    "demo": ("--model", "bigbird_vit_micro", "--baseline", "vit_micro"),
    "teacher": ("--model", "sparsifiner_micro", "--set", "mix.groups=[{{kind: dense, heads: 3}}]"),
    "sparse": SPARSE,
    "sparser": SPARSER,
    "slow": (*SPARSE, "--lr", "5e-4"),
    "slower": (*SPARSER, "--lr", "5e-4"),
}
TITLES = {
    "teacher": "dense teacher",
    "sparse": "keep 0.25, 2 + 18 epochs",
    "sparser": "keep 0.1, 5 + 15 epochs",
}
RATES = (
    ("keep 0.25", "sparse", "2e-3"),
    ("keep 0.25", "slow", "5e-4"),
    ("keep 0.1", "sparser", "2e-3"),
    ("keep 0.1", "slower", "5e-4"),
)
PICTURES = {"curves.png": "curves.png", "bigbird_vit_micro/attention.png": "attention.png"}


def arguments(name: str, runs: Path) -> list[str]:
    """What comes after `attnkit train`."""
    return [*(word.format(runs=runs) for word in RUNS[name]), "--seed", str(SEED), "--out", str(runs / name)]


def run(name: str, runs: Path) -> list[dict[str, Any]]:
    """Trains, or goes on, or only looks whether a finished run is the one that is wanted; then reads it."""
    command = [sys.executable, "-m", "attnkit.cli", "train", *arguments(name, runs), "--resume"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
    return read(name, runs / name)


def read(name: str, folder: Path) -> list[dict[str, Any]]:
    """A finished run: one record a model that was trained in it."""
    rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    found = []
    for row in rows:
        if row["best_epoch"] is None:
            continue
        several = len([one for one in rows if one["best_epoch"] is not None]) > 1
        lines = (folder / row["model"] if several else folder) / "metrics.jsonl"
        epochs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        record = {
            "run": name,
            "model": row["model"],
            "epochs": len(epochs),
            "accuracy": plain(row["val_accuracy"]),
            "best": plain(row["best_val_accuracy"]),
            "best epoch": row["best_epoch"],
            "parameters": row["parameters"],
            "macs": row["macs"],
            "head group macs": row["attention_macs"],
        }
        first = [one["val_accuracy"] for one in epochs if one.get("phase") == RECONSTRUCTION]
        if first:
            rest = [one["val_accuracy"] for one in epochs[len(first) :]]
            record |= {AFTER: plain(first[-1]), LEAST: plain(min(rest))}
        found.append(record)
    return found


def untrained(teacher: Teacher) -> list[dict[str, Any]]:
    """Accuracy with the teacher's weights and predictors that have learned nothing."""
    data, found = teacher.prepared(digits(teacher.preprocess.img_size)), []
    for keep, seed in itertools.product(KEEPS, FRESH):
        torch.manual_seed(seed)
        model = attnkit.build(teacher.sparse_config(keep), num_classes=len(teacher.classes), in_chans=1).eval()
        Sparsifying(SparsifyingOptions(), teacher).begin(model)
        accuracy = dataclasses.replace(teacher, model=model).accuracy(data)
        found.append({"keep": keep, "seed": seed, "accuracy": plain(accuracy)})
    return found


def plain(share: float) -> float:
    """An accuracy as JSON holds it."""
    return round(share, 5)


def measure(runs: Path) -> dict[str, Any]:
    """Everything the pages show."""
    torch.set_num_threads(THREADS)
    records = [record for name in RUNS for record in run(name, runs)]
    return {
        "date": datetime.date.today().isoformat(),
        "attnkit": attnkit.__version__,
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
        "seed": SEED,
        "test images": len(digits((32, 32)).val),
        "runs": records,
        "untrained predictors": untrained(load_teacher(runs / "teacher")),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose first column is text and whose others are numbers."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def prose(text: str) -> str:
    """A paragraph in lines as long as all others."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def percent(share: float, digits: int = 2) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f} %"


def spread(shares: Sequence[float]) -> str:
    """The least and the most in percent."""
    return f"{100 * min(shares):.1f} to {percent(max(shares), 1)}"


def runs_of(numbers: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The models that were trained in a run."""
    return [one for one in numbers["runs"] if one["run"] == name]


def made_with(numbers: dict[str, Any]) -> str:
    """What the numbers were made with."""
    threads = numbers["threads"]
    return (
        f"one run, seed {numbers['seed']}; {numbers['date']}, torch {numbers['torch']}, {threads} "
        f"thread{'s' * (threads > 1)} of a processor that calls itself {numbers['processor']}"
    )


def demo_table(numbers: dict[str, Any]) -> str:
    """What stands between the marks of the README."""
    models = runs_of(numbers, "demo")
    rows = [
        [f"test accuracy after {models[0]['epochs']} epochs", *(percent(one["accuracy"], 1) for one in models)],
        ["parameters", *(f"{one['parameters']:,}" for one in models)],
        ["multiply-adds an image", *(f"{one['macs'] / 1e6:.1f} M" for one in models)],
    ]
    table = markdown(["", *(f"`{one['model']}`" for one in models)], rows)
    return f"{prose(f'It ended with ({made_with(numbers)})')}\n\n{table}"


def sparse_table(numbers: dict[str, Any]) -> str:
    """What stands between the marks of docs/training.md."""
    (teacher,) = runs_of(numbers, "teacher")
    rows, image = [], 1 / numbers["test images"]
    for name, title in TITLES.items():
        (one,) = runs_of(numbers, name)
        cells = [title, percent(one["accuracy"]), percent(one["best"])]
        for what in ("head group macs", "macs"):
            change = f" ({100 * (one[what] / teacher[what] - 1):.1f} %)" if one is not teacher else ""
            cells.append(f"{one[what]:,}{change}")
        rows.append(cells)
    costs = ["multiply-adds in head groups", "of the whole model"]
    first = markdown(["", "test accuracy, last epoch", "best epoch", *costs], rows)
    forgiving = []
    for keep, name in zip(KEEPS, ("sparse", "sparser"), strict=True):
        fresh = [one["accuracy"] for one in numbers["untrained predictors"] if one["keep"] == keep]
        (one,) = runs_of(numbers, name)
        forgiving.append(f"keep {keep:g} gives {spread(fresh)}, and after the first phase {percent(one[AFTER], 1)}")
    rates = []
    for title, name, rate in RATES:
        (one,) = runs_of(numbers, name)
        rates.append([f"{title}, `--lr {rate}`", *(percent(one[what]) for what in (LEAST, "accuracy", "best"))])
    before = prose(
        f"On the handwritten digits, {teacher['epochs']} epochs each and {numbers['test images']} test images, so that "
        f"one image is {percent(image)[:-2]} points ({made_with(numbers)}):"
    )
    after = prose(
        "The sparse models begin as the teacher's best epoch. The digits are forgiving: with its weights and "
        f"predictors that have learned nothing (seeds {FRESH[0]} to {FRESH[-1]}), {'; '.join(forgiving)}."
    )
    second = markdown(["", "least in the second phase", "last epoch", "best epoch"], rates)
    return "\n\n".join([before, first, after, second])


def as_lines(numbers: dict[str, Any]) -> str:
    """JSON with one record a line, so that changes can be read."""
    fields = []
    for name, value in numbers.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(one)}" for one in value) + "\n  ]"
        fields.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def shown(page: Path) -> str:
    """What stands between the marks of a page."""
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def renew(page: Path, text: str) -> None:
    """Writes it anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/measured")
    measured = measure(place)
    NUMBERS.write_text(as_lines(measured), encoding="utf-8")
    renew(README, demo_table(measured))
    renew(PAGE, sparse_table(measured))
    for source, picture in PICTURES.items():
        shutil.copyfile(place / "demo" / source, DOCS / "pictures" / picture)
