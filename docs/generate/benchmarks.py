"""Renews the tables and plots of docs/benchmarks.md from the results in benchmarks/results.

Run it from the repository root, after `attnkit bench` has measured something: python docs/generate/benchmarks.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnkit_models.bench import losses, report, results
from attnkit_models.bench.kinds import KINDS
from attnkit_models.bench.plots import PLOTS
from attnkit_models.bench.sweeps import SWEEPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = "pictures/benchmarks"
BEGIN, END = "<!-- tables: docs/generate/benchmarks.py -->", "<!-- end of the tables -->"

LOSSES = (
    "Everyone who is ahead of attnkit in time or memory, however little: how many times as fast, or which part of "
    "attnkit's memory it needs. Empty where attnkit is not behind."
)
TITLES = {"headline": "The headline", "sweeps": "Sweeps", "models": "Whole models"}
ALT = {
    "density": "Times as fast as dense attention, against density",
    "tokens": "Time and peak memory of a training pass, against tokens",
}


def stored(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results by file name without the ending, but for quick runs."""
    files = sorted(path for path in folder.glob("*.json") if not path.stem.endswith("-quick"))
    return {path.stem: results.read(path) for path in files}


def page(found: dict[str, dict[str, Any]]) -> str:
    """What stands between the marks of the page."""
    if not found:
        return "Nothing was measured yet; `attnkit bench` does it."
    parts: list[str] = []
    order = list(TITLES)
    for stem, one in sorted(found.items(), key=lambda item: (order.index(item[1]["kind"]), item[0])):
        parts += [f"### {TITLES[one['kind']]}: {device(one)}", report.about(one)]
        absent = [f"`{case.name}`" for case in KINDS[one["kind"]] if case.name not in report.by_name(one)]
        if absent:
            parts.append(f"Not measured: {', '.join(absent)}.")
        parts += SECTIONS[one["kind"]](stem, one)
    parts += ["### Where attnkit loses", LOSSES]
    for one in found.values():
        parts += [f"**{TITLES[one['kind']]}, {device(one)}.**", losses.losses(one)]
    missing = report.peers_missing(record for one in found.values() for record in one["cases"])
    if missing:
        parts += ["### Who did not run", missing]
    return "\n\n".join(parts)


def device(one: dict[str, Any]) -> str:
    """The hardware in few words."""
    where = one["machine"]
    return where.get("gpu") or f"{where['processor']}, {where['threads']} threads"


def headline(stem: str, one: dict[str, Any]) -> Iterator[str]:
    """Targets, then the numbers behind them."""
    yield report.targets_table(one)
    for record in one["cases"]:
        density = "" if record["density"] is None else f" Density {report.percent(record['density'])}."
        yield f"**{record['title']}.**{density}{scaled(record)}"
        yield report.case_table(record)


def scaled(record: dict[str, Any]) -> str:
    """Says of contenders that were measured in part how much of them."""
    parts = {name: one["times"] for name, one in record["contenders"].items() if "times" in one}
    return "".join(f" {name}: time of 1/{times} of the queries, times {times}." for name, times in parts.items())


def sweeps(stem: str, one: dict[str, Any]) -> Iterator[str]:
    """Plots, then a table a sweep."""
    for name in PLOTS:
        yield f"![{ALT[name]}]({PICTURES}/{stem}-{name}.png)"
    for sweep in SWEEPS:
        yield f"**{sweep.title[0].upper()}{sweep.title[1:]}.**{turning(sweep, one)}"
        yield report.sweep_table(sweep, one)


def turning(sweep: Any, one: dict[str, Any]) -> str:
    """At which density the sparse layer stops being faster than dense attention."""
    text = ""
    for what in ("forward", "training"):
        points = report.points(sweep, one, what)
        where = report.crossover(points)
        name = report.WHAT[what]
        if where is not None:
            text += f" As fast as dense attention at density {report.percent(where)}, {name}."
        elif len(points) > 1:
            ratios = [faster for _, faster in points]
            if min(ratios) > 1:
                text += f" Faster than dense attention at all densities measured, {name}."
            else:
                often = "Nowhere faster" if max(ratios) <= 1 else "Not everywhere faster"
                text += f" {often} than dense attention at the densities measured, {name}."
    return text


def models(stem: str, one: dict[str, Any]) -> Iterator[str]:
    """A table an image size."""
    for record in one["cases"]:
        batch = record["facts"].get("batch", 1)
        yield f"**{record['title']}, {batch} image{'s' * (batch > 1)} at a time.**"
        yield report.models_table(record)


SECTIONS = {"headline": headline, "sweeps": sweeps, "models": models}


def renew(folder: Path = RESULTS, page_path: Path = PAGE) -> None:
    """Writes the page's part between the marks, and the plots."""
    found = stored(folder)
    for stem, one in found.items():
        if one["kind"] == "sweeps":
            for name, plot in PLOTS.items():
                plot(one, page_path.parent / PICTURES / f"{stem}-{name}.png")
    before, _, rest = page_path.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{page(found)}\n\n{END}{rest.partition(END)[2]}"
    page_path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    renew()
