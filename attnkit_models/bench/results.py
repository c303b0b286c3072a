"""Results: one JSON file a machine and kind of run, a record a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnkit.errors import ConfigError

SCHEMA = 1
HEAD = ("schema", "kind", "machine", "cases")
CASE = ("name", "problem", "title", "sizes", "date", "commit", "load", "density", "facts", "contenders", "seconds")

Results = dict[str, Any]


def empty(kind: str, machine: dict[str, Any]) -> Results:
    """Results without cases."""
    return {"schema": SCHEMA, "kind": kind, "machine": machine, "cases": []}


def read(path: Path) -> Results:
    """Reads a results file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as results: {error}") from error
    problems = wrong(found)
    if problems:
        raise ConfigError(f"{path} is no file of results: {problems[0]}")
    return found


def continued(path: Path, machine: dict[str, Any]) -> Results:
    """Reads a results file to add to it.

    Raises:
        ConfigError: if it is none, or of another machine or other versions: a file names them once for all its cases.
    """
    found = read(path)
    then, now = ({**one, **one["versions"], "versions": None} for one in (found["machine"], machine))
    told = [
        f"{name} {then.get(name)!r}, now {now.get(name)!r}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if told:
        raise ConfigError(
            f"{path} was measured elsewhere ({'; '.join(told)}), so nothing can be added to it; "
            "measure all anew without --only and --resume, or pass another --out FOLDER"
        )
    return found


def wrong(found: Any) -> list[str]:
    """What is wrong with results, in words; empty where nothing is."""
    if not isinstance(found, dict) or any(name not in found for name in HEAD):
        return [f"it must be an object with {', '.join(HEAD)}"]
    if found["schema"] != SCHEMA:
        return [f"its schema is {found['schema']}, this version reads {SCHEMA}"]
    problems = []
    for one in found["cases"]:
        missing = [name for name in CASE if name not in one]
        if missing:
            problems.append(f"case {one.get('name')!r} lacks {', '.join(missing)}")
            continue
        for name, record in one["contenders"].items():
            if not record.get("passed") and ("forward" in record or "training" in record):
                problems.append(f"case {one['name']!r} has times of {name!r}, which did not pass")
    return problems


def write(path: Path, results: Results) -> None:
    """Writes results, a case's contenders a line each so that changes can be read; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = []
    for one in results["cases"]:
        plain = {name: value for name, value in one.items() if name != "contenders"}
        rows = ",\n".join(
            f"      {json.dumps(name)}: {json.dumps(record)}" for name, record in one["contenders"].items()
        )
        cases.append(f'    {json.dumps(plain)[:-1]}, "contenders": {{\n{rows}\n    }}}}')
    head = {name: value for name, value in results.items() if name != "cases"}
    text = json.dumps(head, indent=2)[:-2] + ',\n  "cases": [\n' + ",\n".join(cases) + "\n  ]\n}\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def threads(results: Results) -> int:
    """Threads that results were measured with."""
    return int(results["machine"]["threads"])


def busy(record: dict[str, Any], threads: int) -> bool:
    """Whether a machine did other work before a case: the benchmark itself is a load of its threads at most."""
    return (record["load"] or 0.0) > 0.5 + threads


def merged(results: Results, record: dict[str, Any]) -> Results:
    """Results with a case added at the end, or replaced where it was."""
    cases = {one["name"]: one for one in results["cases"]}
    return {**results, "cases": [*{**cases, record["name"]: record}.values()]}
