"""How tests are dealt out to workers."""

from __future__ import annotations

import itertools

import pytest


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order whose equal parts, one for each worker, all begin with slow ones.

    Each worker of `--dist worksteal` begins with one of these parts; who has done all takes from the end of another.
    Slow tests of a file stay together, since they may share what takes long, unless they are one with other parameters.
    """
    slow: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.nodeid if hasattr(item, "callspec") else str(item.path), []).append(item)
    rest = iter([item for item in items if not item.get_closest_marker("slow")])
    groups, found = list(slow.values()), []
    for worker in range(workers):
        found += itertools.chain(*groups[worker::workers])
        # The last one takes what is left of the division.
        upto = len(items) if worker == workers - 1 else len(items) // workers * (worker + 1)
        found += itertools.islice(rest, max(0, upto - len(found)))
    return found + list(rest)
