"""Losses: every point where attnkit is behind, wrong or missing."""

from __future__ import annotations

from collections.abc import Iterator

from attnkit_models.bench.case import OURS
from attnkit_models.bench.report import WHAT, Record, markdown, speed, told

# The floor of a layer's time, which nobody could use as a layer.
FLOOR = "all but attention"
DENSE_MODEL = "vit_small"
TIMM, GUEST = "timm ", " on "
MEASURES = ("forward", "training", "memory forward", "memory training")


def losses(results: Record) -> str:
    """Every point where someone else, dense attention too, is faster or needs less memory, or attnkit has no number."""
    rows = [row for record in results["cases"] for row in _case(record, results["kind"])]
    if not rows:
        return "Nowhere in these results."
    return markdown(["case", "attnkit's", "who is ahead", *(WHAT[what] for what in MEASURES)], rows, left=3)


def pairs(record: Record, kind: str) -> Iterator[tuple[str, str]]:
    """attnkit's contenders, each with everyone it is held to.

    A recipe is held to timm's models, to the dense ViT, and to itself on its authors' formulation.
    """
    names = sorted(record["contenders"])
    if kind != "models" and record["problem"] != "models":
        yield from ((OURS, name) for name in names if name not in (OURS, FLOOR))
        return
    for ours in own(record, kind):
        for name in names:
            if name != ours and (name.startswith((TIMM, ours + GUEST)) or name == DENSE_MODEL):
                yield ours, name


def own(record: Record, kind: str) -> list[str]:
    """The contenders that are attnkit's."""
    if kind != "models" and record["problem"] != "models":
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
            yield [record["name"], ours, failed, *[""] * len(MEASURES)]
    for ours, name in pairs(record, kind):
        if record["contenders"][name].get("passed"):
            far = [_far(speed(record, name, what, ours), what) for what in MEASURES]
            if any(far):
                yield [record["name"], ours, name, *far]


def _far(ratio: float | None, what: str) -> str:
    """How far the other is ahead; empty where it is not."""
    if ratio is None or ratio >= 1:
        return ""
    if ratio > 0.995:
        return "less than 0.5 %"
    return f"{ratio:.2f} of it" if what.startswith("memory") else f"{1 / ratio:.2f} times as fast"
