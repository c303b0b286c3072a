"""Renews docs/kernels.md: what every kernel of the Triton backend needs, compiled for GPUs that are not there.

Run it from the repository root, on Linux with Triton and without TRITON_INTERPRET: python docs/generate/kernels.py

It compiles more than three thousand kernels, at one to ten seconds of a core each; `--processes 8` takes eight. What
was compiled from the same kernels and the same table is kept, so that it goes on after an interruption, and so does
Triton's own cache. It fails where something spills, passes the shared memory there is, or does without tensor cores.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attnkit.kernels.triton import devices
from attnkit.kernels.triton.sweeping import Family, families
from attnkit_models.bench import roofline
from attnkit_models.bench.report import markdown

PAGE = Path(__file__).parents[1] / "kernels.md"
TABLES = Path(__file__).parents[1] / "tables" / "kernels"
BEGIN, END = "<!-- tables: docs/generate/kernels.py -->", "<!-- end of the tables -->"
LIMITS, LIMITS_END = "<!-- limits: docs/generate/kernels.py -->", "<!-- end of the limits -->"
DEVICES = {
    "sm_80": "NVIDIA Ampere and all others (`sm_80`)",
    "sm_90": "NVIDIA Hopper (`sm_90`)",
    "sm_100": "NVIDIA Blackwell (`sm_100`)",
    "gfx942": "AMD MI300 (`gfx942`)",
}
# Of a line that was not compiled, and between those that the table does not have.
MISSING, NOTHING = "not compiled", ""
# What `--only` is told where the page is to be written anew and nothing compiled.
NO_LINE = "none"
# By the name of a line: its cut, registers, bytes aside, shared memory, instructions, and what is wrong.
Rows = dict[str, list[Any]]


def path_of(family: str) -> Path:
    """The file of what a family's kernels need."""
    return TABLES / f"{family}.json"


def stored(family: str) -> dict[str, Any]:
    """What was found before: fingerprint, Triton's version, and lines; nothing of a family that is new."""
    path = path_of(family)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"triton": "", "lines": {}}


def named(sweep: Family) -> dict[str, list[Any]]:
    """A family's lines by their name, those of all kinds of calls together, in the order of the page."""
    found: dict[str, list[Any]] = {}
    for line in sweep.lines():
        found.setdefault(sweep.name(line), []).append(line)
    return found


def needed(given: tuple[str, str, list[Any]]) -> tuple[str, str, list[Any]]:
    """Family, name and row of the lines of a name: the most that any of their kernels needs."""
    # Triton warns of its own future.
    warnings.simplefilter("ignore")
    family, name, lines = given
    sweep = families()[family]
    most, instructions, faults = [0, 0, 0], set(), set()
    for line in lines:
        try:
            found = sweep.needs(line)
        except Exception as error:
            # Whatever Triton's compilers raise, the other lines are compiled.
            faults.add(f"{_words(line)}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        for one in found:
            *numbers, products = one.compiled
            most = [max(both) for both in zip(most, numbers, strict=True)]
            instructions |= {*products}
            faults |= {f"{_words(line)}, {one.launch.kernel.__name__}: {fault}" for fault in one.faults}
    return family, name, [sweep.cut(lines[0]), *most, ", ".join(sorted(instructions)), sorted(faults)]


def _words(line: Any) -> str:
    return " ".join(map(str, line))


def renew(patterns: Sequence[str], processes: int) -> None:
    """Compiles what is missing of the lines whose names match a pattern, and writes the families' files."""
    found, todo, matched = {}, [], 0
    for family, sweep in families().items():
        head = {"fingerprint": sweep.fingerprint(), "triton": importlib.metadata.version("triton")}
        before = stored(family)
        known = before["lines"] if {key: before.get(key) for key in head} == head else {}
        found[family] = {**head, "lines": known}
        for name, lines in named(sweep).items():
            # What was wrong is tried again.
            if not any(fnmatch.fnmatchcase(f"{family}/{name}", one) for one in patterns):
                continue
            matched += 1
            if name not in known or known[name][-1]:
                todo.append((family, name, lines))
    if not matched and list(patterns) != [NO_LINE]:
        sys.exit(f"no line matches {' or '.join(patterns)}; they are named like blocks/sm_90/forward/bfloat16/32/64")
    # New processes, for the compilers inside Triton do not take a fork.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, (family, name, row) in enumerate(pool.imap_unordered(needed, todo), 1):
            found[family]["lines"][name] = row
            write(family, found[family])
            print(f"{number}/{len(todo)} {family}/{name}", row, flush=True)


def write(family: str, found: dict[str, Any]) -> None:
    """Writes a family's file, a line of the table a line."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found["lines"].items()))
    head = {name: value for name, value in found.items() if name != "lines"}
    TABLES.mkdir(exist_ok=True)
    path_of(family).write_text(json.dumps(head, indent=2)[:-2] + ',\n  "lines": {\n' + rows + "\n  }\n}\n", "utf-8")


def wrong() -> list[str]:
    """What is wrong with the lines that were compiled."""
    return [
        f"{family}: {fault}" for family in families() for row in stored(family)["lines"].values() for fault in row[-1]
    ]


def tables(family: str, sweep: Family) -> str:
    """A family's part of the page."""
    found = stored(family)
    if not found["lines"]:
        return f"### {sweep.TITLE}\n\nNot compiled yet."
    every = named(sweep)
    names, calls = list(every), sum(map(len, every.values()))
    compiled = f"Compiled by Triton {found['triton']}: {len(names):,} lines, for {calls:,} kinds of calls in all."
    parts = [f"### {sweep.TITLE}", compiled]
    for device, title in DEVICES.items():
        limit = devices.SHARED[device] // 1024
        parts += [f"#### {title}", f"Shared memory of a program: {limit} KiB at most."]
        for word, heading in sweep.TABLES.items():
            rows = list(_rows(names, found["lines"], f"{device}/{word}/", list(sweep.COLUMNS)))
            head = [*sweep.ROWS, *sweep.COLUMNS.values()]
            parts += [f"**{heading}.**", markdown(head, rows, left=len(head))] if rows else []
    return "\n\n".join(parts)


def _rows(names: list[str], lines: Rows, table: str, columns: list[str]) -> Iterator[list[str]]:
    own = [name for name in names if name.startswith(table)]
    for row in dict.fromkeys(name.rpartition("/")[0] for name in own):
        cells = []
        for column in columns:
            name = f"{row}/{column}"
            cells.append(_cell(lines.get(name)) if name in own else NOTHING)
        yield [*row.removeprefix(table).split("/"), *cells]


def _cell(row: list[Any] | None) -> str:
    if row is None:
        return MISSING
    cut, registers, aside, shared, instructions, faults = row
    needs = f"{cut}: {registers}{f' + {aside} B' if aside else ''}, {shared / 1024:.0f} K"
    return f"{needs}{f', {instructions}' if instructions else ''}{' **(does not fit)**' if faults else ''}"


def limits() -> str:
    """The roofline of the headline's cases."""
    return "\n\n".join(f"**{device.name}.**\n\n{roofline.limits(device)}" for device in roofline.DEVICES)


def text() -> str:
    """The whole page with new tables."""
    whole = PAGE.read_text(encoding="utf-8")
    found = "\n\n".join(tables(family, sweep) for family, sweep in families().items())
    for begin, part, end in ((LIMITS, limits(), LIMITS_END), (BEGIN, found, END)):
        before, _, rest = whole.partition(begin)
        whole = f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--only", action="append", help="lines whose names match, such as 'blocks/sm_90/*/bfloat16/*'; none"
    )
    given = parser.parse_args()
    renew(given.only or ["*"], given.processes)
    PAGE.write_text(text(), encoding="utf-8")
    sys.exit("\n".join(wrong()) or None)
