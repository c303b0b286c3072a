"""The record of a sweep: a table of what worked and what was refused, for the terminal and for the documentation."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import attnkit
from tests.fuzz.case import KINDS, Result

BEGIN, END = "<!-- record: begin -->", "<!-- record: end -->"


def write_record(results: Sequence[Result], *, start: int, seconds: float, page: Path | None = None) -> str:
    """Counts results per kind as a Markdown table, and puts it into a page between the two marks.

    Args:
        results: what became of every case.
        start: the first seed of every kind.
        seconds: how long the sweep took.
        page: the page, or None to write nothing.

    Returns:
        The table with the date and the versions above it.
    """
    counts = Counter((result.kind, result.outcome) for result in results)
    lines = ["| kind | seeds | worked | refused | findings |", "|---|---|--:|--:|--:|"]
    for kind in KINDS:
        seeds = [result.seed for result in results if result.kind == kind]
        if seeds:
            shown = [f"{counts[kind, outcome]:,}" for outcome in ("worked", "refused", "finding")]
            lines.append(f"| {kind} | {start} to {max(seeds)} | {' | '.join(shown)} |")
    total = Counter(result.outcome for result in results)
    lines.append(f"| all | | {total['worked']:,} | {total['refused']:,} | {total['finding']:,} |")
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    made_with = f"attnkit {attnkit.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    head = f"{len(results):,} cases on {day} in {seconds / 60:.1f} minutes, with {made_with}:"
    text = "\n".join([head, "", *lines])
    if page is not None:
        old = page.read_text(encoding="utf-8")
        before, _, rest = old.partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text
