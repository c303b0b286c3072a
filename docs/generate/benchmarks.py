"""Renews the tables and plots of docs/benchmarks.md, and the README's numbers, from the results in benchmarks/results.

Run it after `attnkit bench` has measured something: python docs/generate/benchmarks.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnkit_models.bench import losses, missed, report, results, roofline
from attnkit_models.bench.case import DENSE, OURS
from attnkit_models.bench.kinds import KINDS
from attnkit_models.bench.plots import PLOTS
from attnkit_models.bench.profiled import PARTS
from attnkit_models.bench.sweeps import SWEEPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = "pictures/benchmarks"
BEGIN, END = "<!-- tables: docs/generate/benchmarks.py -->", "<!-- end of the tables -->"

LOSSES = (
    "Everyone who is ahead of attnkit in time or memory, however little: how many times as fast, or which part of "
    "attnkit's memory it needs. Empty where attnkit is not behind."
)
WHY = "Why targets are missed"
PROFILED = (
    "Each case ran once more under PyTorch's profiler. Every operator's own time is put to one of these parts; in a "
    "backward pass an operator belongs where the one whose gradient it computes does."
)
ROOFLINE = "What the GPU [allows at best](kernels.md#what-a-gpu-allows), by what a call needs, and what was measured:"
TITLES = {"headline": "The headline", "sweeps": "Sweeps", "models": "Whole models", "gpu": "On a GPU"}
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
    targets = report.targets_table(one)
    yield targets or "Targets are for another kind of device."
    limits = roofline.table(one)
    if limits:
        yield f"{ROOFLINE}\n\n{limits}"
    for record in one["cases"]:
        density = "" if record["density"] is None else f" Density {report.percent(record['density'])}."
        yield f"**{record['title']}.**{density}{scaled(record)}"
        yield report.models_table(record) if record["problem"] == "models" else report.case_table(record)
    if not targets:
        return
    yield f"#### {WHY}: {device(one)}"
    yield PROFILED + "\n\n" + report.markdown(["part", "what it is"], [[f"*{a}*", b] for a, b in PARTS.items()], left=2)
    yield missed.reasons(one)


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


SECTIONS = {"headline": headline, "sweeps": sweeps, "models": models, "gpu": headline}


# What the README says, and the numbers in it: a case and a contender each.
SAYS = (
    (r"took [\d,.]+ ms where dense attention took [\d,.]+, and", "took {} ms where dense attention took {}, and"),
    (r"[\d,.]+ ms where a dense layer took [\d,.]+\.", "{} ms where a dense layer took {}."),
)
NAMED = ("regions/128x128", "predicted_keys/3136")


def readme(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The README with the times of the first machine's headline in it."""
    cases = next((report.by_name(one) for one in found.values() if one["kind"] == "headline"), {})
    for name, (pattern, sentence) in zip(NAMED, SAYS, strict=True):
        times = [report.number(cases[name], who, "forward") for who in (OURS, DENSE)] if name in cases else [None]
        if all(times):
            spaced = pattern.replace(" ", r"\s+")
            put = sentence.format(*(f"{time:,.0f}" for time in times if time))
            # Line breaks stay where they are.
            text = re.sub(spaced, lambda match, put=put: _as_broken(match[0], put), text, count=1)
    return text


def _as_broken(before: str, after: str) -> str:
    """Words in place of as many others, with the white space between those."""
    gaps = [*re.findall(r"\s+", before), ""]
    return "".join(word + gap for word, gap in zip(after.split(), gaps, strict=True))


def renew(folder: Path = RESULTS, page_path: Path = PAGE, readme_path: Path = README) -> None:
    """Writes the page's part between the marks, the plots, and the README's numbers."""
    found = stored(folder)
    readme_path.write_text(readme(readme_path.read_text(encoding="utf-8"), found), encoding="utf-8")
    for stem, one in found.items():
        if one["kind"] == "sweeps":
            for name, plot in PLOTS.items():
                plot(one, page_path.parent / PICTURES / f"{stem}-{name}.png")
    before, _, rest = page_path.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{page(found)}\n\n{END}{rest.partition(END)[2]}"
    page_path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    renew()
