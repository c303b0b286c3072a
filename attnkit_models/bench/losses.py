"""Losses: every point where attnkit is behind, wrong or missing."""

from __future__ import annotations

from collections.abc import Iterator

from attnkit_models.bench.case import OURS
from attnkit_models.bench.report import WHAT, Record, markdown, speed, told

# The floor of a layer's time, which nobody could use as a layer.
FLOOR = "all but attention"
DENSE_MODEL = "vit_small"
TIMM, GUEST = "timm ", " on "


def losses(results: Record) -> str:
    """Every point where someone else, dense attention too, is faster or needs less memory, or attnkit has no number."""
    rows = [row for record in results["cases"] for row in _case(record, results["kind"])]
    if not rows:
        return "Nowhere in these results."
    return markdown(["case", "attnkit's", "measure", "who is ahead", "how far"], rows, left=5)


def pairs(record: Record, kind: str) -> Iterator[tuple[str, str]]:
    """attnkit's contenders, each with everyone it is held to.

    A recipe is held to timm's models, to the dense ViT, and to itself on its authors' formulation.
    """
    names = sorted(record["contenders"])
    if kind != "models":
        yield from ((OURS, name) for name in names if name not in (OURS, FLOOR))
        return
    for ours in own(record, kind):
        for name in names:
            if name != ours and (name.startswith((TIMM, ours + GUEST)) or name == DENSE_MODEL):
                yield ours, name


def own(record: Record, kind: str) -> list[str]:
    """The contenders that are attnkit's."""
    if kind != "models":
        return [OURS]
    return [name for name in record["contenders"] if not name.startswith(TIMM) and GUEST not in name]


def failure(record: Record, ours: str = OURS) -> str:
    """Why attnkit has no numbers in a case; empty where it has."""
    if "error" in record:
        return f"not measured: {record['error']}"
    found = record["contenders"].get(ours, {"why_not": "it was left out"})
    if "why_not" in found:
        return f"attnkit did not run: {found['why_not']}"
    return "" if found.get("passed") else f"attnkit is **wrong**: {told(found['errors'])}"


def _case(record: Record, kind: str) -> Iterator[list[str]]:
    for ours in own(record, kind) or [OURS]:
        failed = failure(record, ours)
        if failed:
            yield [record["name"], ours, "", "", failed]
    for ours, name in pairs(record, kind):
        for what in ("forward", "training", "memory forward", "memory training"):
            ratio = speed(record, name, what, ours)
            if ratio is not None and ratio < 1 and record["contenders"][name].get("passed"):
                yield [record["name"], ours, WHAT[what], name, _far(ratio, what)]


def _far(ratio: float, what: str) -> str:
    if ratio > 0.995:
        return "less than 0.5 %"
    if what.startswith("memory"):
        return f"{ratio:.2f} of attnkit's memory"
    return f"{1 / ratio:.2f} times as fast"
