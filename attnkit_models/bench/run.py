"""Runs cases one after the other and writes each result as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from attnkit_models.bench import report, results
from attnkit_models.bench.case import Case, Setting
from attnkit_models.bench.machine import commit, now
from attnkit_models.bench.results import busy
from attnkit_models.bench.runner import Record, run_case, short, time_again

QUICK = 0.05
# Shares of a case's time: when it is measured, and when it is timed again after all others.
FIRST, AGAIN = 0.6, 0.4
# A call on a GPU takes a fraction of its time on two cores, so that enough rounds fit into less.
CUDA = 0.4


def run_all(
    cases: Sequence[Case],
    before: results.Results,
    path: Path,
    setting: Setting,
    tell: Callable[[str], object],
    *,
    quick: bool = False,
    resume: bool = False,
) -> results.Results:
    """Measures cases into a file of results; on a CPU, times them again after the last one.

    Args:
        cases: what to measure.
        before: results so far, whose other cases stay.
        path: the file.
        setting: where and how.
        tell: gets lines for the terminal.
        quick: spend a twentieth of the time, on the CPU with the small sizes of cases that have some. On CUDA four
            tenths are spent, quick or not.
        resume: leave out cases that were measured at this commit; those that were not timed again are.
    """
    found, here, on_cpu = before, commit(), setting.device.type == "cpu"
    spent = (QUICK if quick else 1.0) * (1.0 if on_cpu else CUDA)
    if quick and on_cpu:
        cases = [_small(case) for case in cases]
    measured: list[tuple[Case, Record]] = []
    done = {one["name"]: one for one in before["cases"] if one["commit"] == here and "error" not in one}
    for case in cases:
        if resume and here and case.name in done:
            tell(f"{case.name}: measured at this commit")
            if "visits" not in done[case.name]:
                measured.append((case, done[case.name]))
            continue
        record = _run(case, setting, spent * (FIRST if on_cpu else 1.0))
        if quick:
            record["quick"] = True
        measured.append((case, record))
        if busy(record, results.threads(before)):
            tell(f"the machine was busy before this case (load {record['load']}): do not trust its times")
        for line in report.lines(case, record):
            tell(line)
        found = results.merged(found, record)
        results.write(path, found)
    # One case alone would be timed again at the same time.
    for case, record in measured if on_cpu and (len(measured) > 1 or resume) else ():
        if "error" not in record:
            found = results.merged(found, time_again(case, setting, record, spent * AGAIN))
            results.write(path, found)
            if "visits" in record:
                for line in ("once more:", *report.lines(case, record)):
                    tell(line)
    return found


def _small(case: Case) -> Case:
    """A case at the sizes of a quick run on the CPU."""
    if not case.small:
        return case
    sizes = ", ".join(f"{name} {one}" for name, one in case.small.items())
    return replace(case, sizes={**case.sizes, **case.small}, title=f"{case.title}; at small sizes: {sizes}")


def _run(case: Case, setting: Setting, share: float) -> Record:
    """A case's record; one that cannot be made ready, for want of memory say, does not end the run."""
    started = now()
    try:
        return run_case(case, setting, share)
    except Exception as error:
        # Compilers and libraries have errors of their own.
        head = {"name": case.name, "problem": case.problem, "title": case.title, "sizes": dict(case.sizes)}
        empty = {"density": None, "facts": {}, "contenders": {}, "seconds": 0.0}
        return {**head, **started, **empty, "error": short(error)}
