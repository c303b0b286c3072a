"""Report: what results say, as tables in Markdown; losing points included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attnkit_models.bench.case import DENSE, OURS, Case, Target
from attnkit_models.bench.kinds import KINDS
from attnkit_models.bench.results import busy, threads
from attnkit_models.bench.sweeps import Sweep

Record = dict[str, Any]

WHAT = {
    "forward": "forward",
    "training": "forward and backward",
    "memory forward": "memory, forward",
    "memory training": "memory, forward and backward",
    "efficiency forward": "sparse efficiency, forward",
    "efficiency training": "sparse efficiency, forward and backward",
}


def number(record: Record, contender: str, measure: str) -> float | None:
    """Milliseconds (the fastest round) or bytes of a contender; None where it has none."""
    found = record["contenders"].get(contender, {}).get(measure)
    return found["min"] if isinstance(found, dict) else found


def speed(record: Record, against: str, measure: str, us: str = OURS) -> float | None:
    """The other's number divided by attnkit's."""
    ours, theirs = number(record, us, measure), number(record, against, measure)
    return theirs / ours if ours and theirs is not None else None


def efficiency(record: Record, what: str) -> float | None:
    """Density times time of dense attention / attnkit's time: 1 where all sparsity became speed."""
    ratio = speed(record, DENSE, what)
    return None if ratio is None or record["density"] is None else record["density"] * ratio


def ratio(cases: dict[str, Record], name: str, target: Target) -> float | None:
    """What a target is about, or None where results do not tell."""
    record = cases.get(name)
    if record is None:
        return None
    if target.case:
        other = cases.get(target.case)
        theirs = None if other is None else number(other, OURS, target.measure)
        ours = number(record, OURS, target.measure)
        return theirs / ours if ours and theirs is not None else None
    if target.measure.startswith("efficiency"):
        return efficiency(record, target.measure.removeprefix("efficiency "))
    return speed(record, target.against, target.measure)


def by_name(results: Record) -> dict[str, Record]:
    """The records of results by case."""
    return {one["name"]: one for one in results["cases"]}


def promising(results: Record) -> list[Case]:
    """The cases at hand with targets for the kind of device that they were measured on."""
    there, device = by_name(results), results["machine"].get("device", "cpu").partition(":")[0]
    return [
        case for case in KINDS.get(results["kind"], ()) if case.name in there and case.targets and case.device == device
    ]


def targets_table(results: Record) -> str:
    """Every target of the cases at hand: the ratio found, and whether it was reached; empty where there are none."""
    cases = by_name(results)
    rows = []
    for case in promising(results):
        for target in case.targets:
            found = ratio(cases, case.name, target)
            against = target.case or target.against
            verdict = reached(cases[case.name], found, target, threads(results))
            shown = "" if found is None else f"{found:.2f}"
            wanted = [f"{target.at_least:g}"] * bool(target.at_least) + [f"(aim {target.aim:g})"] * bool(target.aim)
            rows.append(
                [
                    case.title if target is case.targets[0] else "",
                    against,
                    WHAT[target.measure],
                    " ".join(wanted),
                    shown,
                    verdict,
                ]
            )
    head = ["case", "against", "measure", "target", "found", "reached"]
    return markdown(head, rows, left=3) if rows else ""


def reached(record: Record, found: float | None, target: Target, threads: int) -> str:
    """The verdict on a target: `"yes"`, or why not. Bytes are the same on a busy machine, times are not."""
    if found is not None and record.get("quick"):
        return "not judged: a quick run"
    if found is not None and busy(record, threads) and not target.measure.startswith("memory"):
        return f"not judged: the machine was busy (load {record['load']})"
    if found is not None and not target.at_least:
        return "reported"
    if found is not None:
        return "yes" if found >= target.at_least else "**missed**"
    ours = record["contenders"].get(OURS, {})
    return "**wrong**" if ours.get("errors") and not ours.get("passed") else "not measured"


def case_table(record: Record) -> str:
    """All contenders of a case."""
    if "error" in record:
        return f"Not measured: {record['error']}."
    rows = []
    for name, one in record["contenders"].items():
        if "why_not" in one:
            rows.append([name, f"not run: {one['why_not']}", *[""] * 5])
        elif not one.get("passed"):
            rows.append([name, f"**wrong**: {told(one['errors'])}", *[""] * 5])
        else:
            share = [""] * 2
            if name == OURS:
                share = [plain(efficiency(record, what)) for what in ("forward", "training")]
            rows.append([name, *cells(record, name), *share])
    head = ["", "forward", "forward and backward", "memory, forward", "memory, both", "efficiency, forward", "both"]
    return markdown(head, rows)


def cells(record: Record, name: str) -> list[str]:
    """Two times and two peaks of a contender."""
    failed = {what: f"failed {what}" in record["contenders"][name] for what in ("forward", "training")}
    times = ["failed" if failed[what] else milliseconds(number(record, name, what)) for what in failed]
    return times + [megabytes(number(record, name, f"memory {what}")) for what in ("forward", "training")]


def sweep_table(sweep: Sweep, results: Record) -> str:
    """A sweep: a row per size and contender."""
    cases = by_name(results)
    rows = []
    for case in sweep.cases:
        record = cases.get(case.name)
        if record is None:
            continue
        if "error" in record:
            rows.append([case.title, "", "", f"not measured: {record['error']}", *[""] * 5])
        for at, (name, one) in enumerate(record["contenders"].items()):
            if "why_not" in one:
                continue
            label = case.title if at == 0 else ""
            dense = "" if at or record["density"] is None else percent(record["density"])
            numbers = cells(record, name) if one.get("passed") else [f"**wrong**: {told(one['errors'])}", "", "", ""]
            share = [plain(efficiency(record, what)) if at == 0 else "" for what in ("forward", "training")]
            rows.append([label, dense, name, *numbers, *share])
    head = [
        sweep.axis,
        "density",
        "",
        "forward",
        "forward and backward",
        "memory, forward",
        "memory, both",
        "efficiency, forward",
        "both",
    ]
    return markdown(head, rows, left=3)


def models_table(record: Record) -> str:
    """Images a second and memory of whole models at one size."""
    if "error" in record:
        return f"Not measured: {record['error']}."
    rows = []
    images = record["facts"].get("batch", 1)
    for name, one in record["contenders"].items():
        if "why_not" in one or not one.get("passed"):
            why = one.get("why_not") or f"**wrong**: {told(one['errors'])}"
            rows.append([name, why, "", "", ""])
            continue
        found = [number(record, name, what) for what in ("forward", "training")]
        rates = ["" if ms is None else digits(1e3 * images / ms) for ms in found]
        peaks = [megabytes(number(record, name, f"memory {what}")) for what in ("forward", "training")]
        rows.append([name, *rates, *peaks])
    head = ["model", "inference, images/s", "training, images/s", "memory, inference", "memory, training"]
    return markdown(head, rows)


def peers_missing(records: Iterable[Record]) -> str:
    """Contenders that did not run, each with its reason once."""
    found: dict[str, str] = {}
    for record in records:
        for name, one in record["contenders"].items():
            for why in [text for what, text in one.items() if what == "why_not" or what.startswith("failed")]:
                found.setdefault(name, why)
    return "\n".join(f"- {name}: {why}" for name, why in sorted(found.items()))


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """The density at which a speed-up falls to 1, between two measured points, on logarithmic axes.

    Args:
        points: density and speed-up, at least two.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(points)):
        if y0 > 1 >= y1:
            share = math.log(y0) / (math.log(y0) - math.log(y1))
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return None


def points(sweep: Sweep, results: Record, what: str) -> list[tuple[float, float]]:
    """Density and speed-up over dense attention along a sweep."""
    cases = by_name(results)
    found = []
    for case in sweep.cases:
        record = cases.get(case.name)
        faster = None if record is None else speed(record, DENSE, what)
        if record is not None and faster is not None and record["density"]:
            found.append((record["density"], faster))
    return found


def about(results: Record) -> str:
    """One paragraph on where results come from."""
    where, cases = results["machine"], results["cases"]
    gpu = f"{where['gpu']}, CUDA {where['cuda']}, beside " if "gpu" in where else ""
    dates = sorted({one["date"] for one in cases})
    loads = [one["load"] for one in cases if one["load"] is not None]
    versions = ", ".join(f"{name} {one}" for name, one in where["versions"].items())
    commits = ", ".join(sorted({one["commit"] for one in cases if one["commit"]})) or "unknown"
    busy = f" Load average before cases: {min(loads)} to {max(loads)}." if loads else ""
    return (
        f"{gpu}{where['processor']} ({where['instructions']}), {where['threads']} threads, {where['memory']}; "
        f"{where['dtype']}; Python {where['python']}, {versions}, attnkit {where['attnkit']} at commit {commits}; "
        f"{' to '.join(sorted({dates[0], dates[-1]})) if dates else 'nothing measured'}.{busy}"
    )


def lines(case: Case, record: Record) -> Iterator[str]:
    """A case for the terminal, a line per contender."""
    yield f"{case.name}: {case.title}" + (f" ({record['error']})" if "error" in record else "")
    for name, one in record["contenders"].items():
        if "why_not" in one:
            yield f"    {name:28} not run: {one['why_not']}"
        elif not one.get("passed"):
            yield f"    {name:28} WRONG, so not timed: {told(one['errors'])}"
        else:
            forward, training, peak, both = cells(record, name)
            yield f"    {name:28} {forward:>10} forward {training:>10} with backward {peak:>9} {both:>9}"
    for what, one in record.get("profile", {}).items():
        largest = sorted(one["shares"].items(), key=lambda item: -item[1])[:4]
        spent = ", ".join(f"{part} {100 * share:.0f} %" for part, share in largest if share >= 0.005)
        yield f"    attnkit's time, {WHAT[what]}: {spent}"


def told(errors: dict[str, Any]) -> str:
    """Errors in words."""
    return ", ".join(f"{name} off by {one}" for name, one in errors.items())


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plain(value: float | None) -> str:
    """Two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def percent(share: float) -> str:
    """A density."""
    return f"{100 * share:.3g} %"


def milliseconds(value: float | None) -> str:
    """A time."""
    return "" if value is None else f"{digits(value)} ms"


def megabytes(value: float | None) -> str:
    """A peak of memory."""
    return "" if value is None else f"{digits(value / 1e6)} MB"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers."""
    every = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)
