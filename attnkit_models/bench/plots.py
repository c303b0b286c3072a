"""Plots of results: speed against density with the crossover marked, time and memory against tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnkit.errors import load_extra
from attnkit_models.bench.case import OURS
from attnkit_models.bench.report import by_name, crossover, number, points
from attnkit_models.bench.sweeps import IMAGE_SIZE, KEEP, TOPK, WINDOW

BY_DENSITY = (TOPK, WINDOW, KEEP)
COLORS = ("#1f6f8b", "#d1495b", "#7a9e3a", "#8d6cab", "#c98a2b")


def figure(columns: int) -> tuple[Any, Any]:
    """A figure with some axes side by side."""
    load_extra("matplotlib", extra="train", purpose="plots")
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.2 * columns, 3.8), layout="constrained", dpi=110)
    return made, made.subplots(1, columns, squeeze=False)[0]


def plot_density(results: dict[str, Any], path: Path) -> None:
    """Speed-up over dense attention against density; a cross marks where it falls to 1."""
    made, axes = figure(2)
    for axis, (what, title) in zip(axes, (("forward", "forward"), ("training", "forward and backward")), strict=True):
        for color, sweep in zip(COLORS, BY_DENSITY, strict=False):
            found = sorted(points(sweep, results, what))
            if not found:
                continue
            label = sweep.title.partition(",")[0] + f" (by {sweep.axis})"
            axis.plot(*zip(*found, strict=True), marker="o", markersize=4, color=color, label=label)
            where = crossover(found)
            if where is not None:
                axis.plot([where], [1.0], marker="x", markersize=10, markeredgewidth=2, color=color)
                axis.annotate(
                    f"{100 * where:.2g} %", (where, 1.0), textcoords="offset points", xytext=(6, 6), color=color
                )
        shares = [0.01, 1.0]
        axis.plot(
            shares,
            [1 / share for share in shares],
            color="grey",
            linewidth=0.8,
            linestyle=":",
            label="all sparsity becomes speed",
        )
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="density", ylabel="times as fast as dense attention", title=title)
        axis.legend(fontsize=7)
    save(made, path)


def plot_tokens(results: dict[str, Any], path: Path) -> None:
    """Time and peak memory of a training pass against the number of tokens."""
    made, axes = figure(2)
    cases = by_name(results)
    records = [cases[case.name] for case in IMAGE_SIZE.cases if case.name in cases]
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    kinds = (("training", 1.0, "milliseconds"), ("memory training", 1e6, "MB at the peak"))
    for axis, (measure, unit, label) in zip(axes, kinds, strict=True):
        for color, name in zip(COLORS, names, strict=False):
            found = [(record["facts"]["tokens"], number(record, name, measure)) for record in records]
            drawn = [(tokens, value / unit) for tokens, value in found if value]
            if drawn:
                width = 2.2 if name == OURS else 1.2
                axis.plot(*zip(*drawn, strict=True), marker="o", markersize=4, color=color, linewidth=width, label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title="forward and backward")
        axis.legend(fontsize=7)
    save(made, path)


def save(made: Any, path: Path) -> None:
    """Writes a picture that is the same for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, metadata={"Software": None})


PLOTS = {"density": plot_density, "tokens": plot_tokens}
