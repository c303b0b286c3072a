"""Renews docs/kernels.md: what every kernel of the Triton backend needs, compiled for GPUs that are not there.

Run it from the repository root, on Linux with Triton and without TRITON_INTERPRET: python docs/generate/kernels.py

It compiles some five thousand kernels, which takes more than an hour on one core; `--processes 8` takes eight. What was
compiled from the same kernels and the same table is kept, so that it goes on after an interruption. It fails where
something spills, passes the shared memory there is, or does without tensor cores.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import itertools
import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkit.kernels.triton import devices
from attnkit.kernels.triton.blocks import configs, sweep
from attnkit_models.bench import roofline
from attnkit_models.bench.report import markdown

PAGE = Path(__file__).parents[1] / "kernels.md"
NEEDS = Path(__file__).parents[1] / "tables" / "kernels.json"
BEGIN, END = "<!-- tables: docs/generate/kernels.py -->", "<!-- end of the tables -->"
LIMITS, LIMITS_END = "<!-- limits: docs/generate/kernels.py -->", "<!-- end of the limits -->"
DEVICES = {
    "sm_80": "NVIDIA Ampere and all others (`sm_80`)",
    "sm_90": "NVIDIA Hopper (`sm_90`)",
    "sm_100": "NVIDIA Blackwell (`sm_100`)",
    "gfx942": "AMD MI300 (`gfx942`)",
}
NAMES = {"forward": "Forward", "query_gradient": "Gradient of queries", "key_gradient": "Gradients of keys and values"}
# Of a line that was not compiled, or that does not fit.
NOTHING = "no numbers"
Needs = dict[str, Any]


def key(line: sweep.Line) -> str:
    """A line's name in the file: `"sm_90/forward/bfloat16/64/32"`, and `" and bias"` behind the numbers with one."""
    numbers = line.numbers + " and bias" * line.bias
    return "/".join((line.device_class, line.direction, numbers, str(line.tile), str(line.head_dim)))


def needed(line: sweep.Line) -> tuple[str, list[Any], list[str]]:
    """Name, needs and faults of a line for one kind of calls: registers, bytes aside, shared memory, instructions."""
    # Triton warns of its own future.
    warnings.simplefilter("ignore")
    try:
        found = sweep.needs(line)
    except Exception as error:
        # Whatever Triton's compilers raise, the other lines are compiled.
        return key(line), [], [f"{key(line)}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    first = found[0].compiled
    numbers = [max(one.compiled[at] for one in found) for at in range(3)]
    faults = [f"{key(line)}, {one.launch.kernel.__name__}: {fault}" for one in found for fault in one.faults]
    return key(line), [*numbers, ", ".join(first.instructions)], faults


def stored() -> Needs:
    """What was found before."""
    return json.loads(NEEDS.read_text(encoding="utf-8"))


def renew(patterns: Sequence[str], processes: int) -> list[str]:
    """Compiles what is missing of the lines whose names match a pattern, writes the file, and tells what is wrong."""
    head = {"fingerprint": sweep.fingerprint(), "triton": importlib.metadata.version("triton")}
    before = stored() if NEEDS.exists() else {}
    lines = before["lines"] if {name: before.get(name) for name in head} == head else {}
    wanted: dict[str, list[sweep.Line]] = {}
    for line in sweep.lines():
        if key(line) not in lines and any(fnmatch.fnmatchcase(key(line), one) for one in patterns):
            wanted.setdefault(key(line), []).append(line)
    faults = []
    # New processes, for the compilers inside Triton do not take a fork.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        todo = (one for some in wanted.values() for one in some)
        for name, group in itertools.groupby(pool.imap(needed, todo), key=lambda one: one[0]):
            rows = list(group)
            wrong = [fault for _, _, some in rows for fault in some]
            faults += wrong
            if not wrong:
                lines[name] = [*(max(row[at] for _, row, _ in rows) for at in range(3)), rows[0][1][3]]
                write({**head, "lines": lines})
            print(name, "; ".join(wrong) or lines[name], flush=True)
    write({**head, "lines": lines})
    return faults


def write(found: Needs) -> None:
    """Writes the file, a line of the table a line."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found["lines"].items()))
    head = {name: value for name, value in found.items() if name != "lines"}
    NEEDS.write_text(json.dumps(head, indent=2)[:-2] + ',\n  "lines": {\n' + rows + "\n  }\n}\n", encoding="utf-8")


def page(found: Needs) -> str:
    """What stands between the marks of the page."""
    parts = [f"Compiled by Triton {found['triton']}."]
    for device, title in DEVICES.items():
        limit = devices.SHARED[device] // 1024
        if not any(name.startswith(f"{device}/") for name in found["lines"]):
            continue
        parts += [f"### {title}", f"Shared memory of a program: {limit} KiB at most."]
        for direction in configs.DIRECTIONS:
            rows = list(_rows(found["lines"], device, direction))
            head = ["numbers", "head dim", *(f"regions of {size}" for size in configs.REGION_SIZES)]
            head[-1] += " and more"
            if rows:
                parts += [f"**{NAMES[direction]}.**", markdown(head, rows, left=len(head))]
    return "\n\n".join(parts)


def _rows(lines: dict[str, list[Any]], device: str, direction: configs.Direction) -> Iterator[list[str]]:
    for numbers, width in itertools.product(_numbers(), configs.HEAD_DIMS):
        cells = []
        for tile in configs.REGION_SIZES:
            row = lines.get("/".join((device, direction, numbers, str(tile), str(width))))
            if row is None:
                cells.append(NOTHING)
                continue
            rounded = numbers.startswith("tf32")
            dtype = torch.float32 if rounded or numbers.startswith("float32") else torch.bfloat16
            config = configs.configuration(direction, tile, width, dtype, device, numbers.endswith("bias"), rounded)
            tiles = f"{config.rows}x{config.columns}, {config.warps} w, {config.stages} s"
            aside = f" + {row[1]} B" if row[1] else ""
            cells.append(f"{tiles}: {row[0]}{aside}, {row[2] / 1024:.0f} K{f', {row[3]}' if row[3] else ''}")
        if any(cell != NOTHING for cell in cells):
            yield [numbers, str(width), *cells]


def _numbers() -> Iterator[str]:
    for numbers in sweep.NUMBERS:
        yield numbers
        if numbers != "float16":
            yield f"{numbers} and bias"


def limits() -> str:
    """The roofline of the headline's cases."""
    return "\n\n".join(f"**{device.name}.**\n\n{roofline.limits(device)}" for device in roofline.DEVICES)


def text(found: Needs) -> str:
    """The whole page with new tables."""
    whole = PAGE.read_text(encoding="utf-8")
    for begin, part, end in ((LIMITS, limits(), LIMITS_END), (BEGIN, page(found), END)):
        before, _, rest = whole.partition(begin)
        whole = f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", action="append", help="lines whose names match, such as 'sm_90/*/bfloat16/*'")
    given = parser.parse_args()
    wrong = renew(given.only or ["*"], given.processes)
    PAGE.write_text(text(stored()), encoding="utf-8")
    sys.exit("\n".join(wrong) or None)
