"""Records: what became of a line, as results have it, in a line for the terminal, and as a table."""

from __future__ import annotations

from typing import Any

from attnkit_models.bench.report import markdown, milliseconds
from attnkit_models.bench.tuning.workbench import Workbench

KIND = "tuning"


def contenders(bench: Workbench) -> dict[str, Any]:
    """What every configuration took in each scene, or why it was left out."""
    found: dict[str, Any] = {}
    for cut, scenes in bench.times.items():
        found[str(cut)] = {"passed": True, "scenes": {scene: times.record() for scene, times in scenes.items()}}
    for cut, why in bench.dropped.items():
        found[str(cut)] = {**found.get(str(cut), {}), "passed": False, "why_not": why}
    return found


def told(record: dict[str, Any]) -> str:
    """A line for the terminal: the configuration that the table has now, and why."""
    name, facts = f"{record['name']:44}", record["facts"]
    if "error" in record:
        return f"{name} not timed: {record['error']}"
    if facts["before"] != facts["after"]:
        return f"{name} now {facts['after']}{_by(facts)}, was {facts['before']}"
    more = f", for {facts['fastest']} is not surely faster{_by(facts)}" if "fastest" in facts else ""
    return f"{name} kept {facts['after']}{more}"


def table(record: dict[str, Any]) -> str:
    """All configurations of a line that were tried."""
    if "error" in record:
        return f"Not timed: {record['error']}."
    scenes = list(dict.fromkeys(scene for one in record["contenders"].values() for scene in one.get("scenes", ())))
    rows = []
    for cut, one in record["contenders"].items():
        found = one.get("scenes", {})
        times = [milliseconds(found[scene]["min"]) if scene in found else "" for scene in scenes]
        rows.append([cut, one.get("why_not", "in the table" * (cut == record["facts"]["after"])), *times])
    return markdown(["configuration", "", *scenes], rows, left=2)


def _by(facts: dict[str, Any]) -> str:
    """By how much one is faster; empty where the other does not run."""
    return f" ({facts['ratio']:.2f} of its time, +- {100 * facts['noise']:.1f} %)" if "ratio" in facts else ""
