"""Missed: which cases miss a target, and where attnkit's time goes in them."""

from __future__ import annotations

from collections.abc import Iterator

from attnkit_models.bench.case import OURS, Case
from attnkit_models.bench.losses import FLOOR
from attnkit_models.bench.profiled import FUSED, PARTS
from attnkit_models.bench.report import (
    WHAT,
    Record,
    by_name,
    digits,
    efficiency,
    markdown,
    milliseconds,
    number,
    promising,
    ratio,
    reached,
)
from attnkit_models.bench.results import threads

PASSES = ("forward", "training")


def missed(results: Record) -> list[str]:
    """Names of the cases that miss a target, or whose numbers are wrong."""
    cases = by_name(results)
    verdicts = {
        case.name: {
            reached(cases[case.name], ratio(cases, case.name, one), one, threads(results)) for one in case.targets
        }
        for case in promising(results)
    }
    return [name for name, found in verdicts.items() if found & {"**missed**", "**wrong**"}]


def reasons(results: Record) -> str:
    """For every case that misses a target: what bounds it, and attnkit's time by what it is spent on."""
    cases, names = by_name(results), missed(results)
    if not names:
        return "All targets were reached."
    parts = []
    for case in promising(results):
        if case.name in names:
            record = cases[case.name]
            said = " ".join(filter(None, [case.bound, *_facts(case, record)]))
            parts += [f"`{case.name}`: {said}" if said else f"`{case.name}`:", profile_table(record)]
    return "\n\n".join(parts)


def profile_table(record: Record) -> str:
    """Shares of attnkit's time, a row a pass; parts that take less than half a percent everywhere are left out."""
    found = record.get("profile") or {}
    if not found:
        return "No profile was made."
    shown = [part for part in PARTS if any(one["shares"][part] >= 0.005 for one in found.values())]
    rows = [
        [WHAT[what], milliseconds(one["milliseconds"]), *(f"{100 * one['shares'][part]:.0f} %" for part in shown)]
        for what, one in found.items()
    ]
    return markdown(["", "under the profiler", *shown], rows)


def _facts(case: Case, record: Record) -> Iterator[str]:
    """What follows from the numbers: the efficiency that is left to win, and the floor of a layer."""
    for what in PASSES:
        share = (record.get("profile") or {}).get(what, {}).get("shares", {}).get(FUSED, 0.0)
        whole = efficiency(record, what)
        if share and whole and any(one.measure == f"efficiency {what}" for one in case.targets):
            yield f"If fused attention alone took time, sparse efficiency would be {whole / share:.2f} ({WHAT[what]})."
    floor, ours = number(record, FLOOR, "forward"), number(record, OURS, "forward")
    if floor and ours:
        yield f"All but attention takes {digits(floor)} of {digits(ours)} ms forward."
        for target in case.targets:
            theirs = number(record, target.against, target.measure) if target.measure == "forward" else None
            if theirs:
                yield (
                    f"No attention, however fast, would make it more than {theirs / floor:.2f} times as fast as "
                    f"*{target.against}*."
                )
