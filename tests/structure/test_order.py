"""In which order the workers of `make test` get the tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.dealing import dealt


def item(name, *, slow=False, cases=False):
    path, _, _ = name.partition("::")
    given = {"callspec": None} if cases else {}
    return SimpleNamespace(nodeid=name, path=path, get_closest_marker=lambda _: slow or None, **given)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_begins_with_slow_tests_and_none_is_lost(workers):
    items = [item(f"a.py::{at}") for at in range(8)]
    items += [item(f"b.py::case[{at}]", slow=True, cases=True) for at in range(4)]
    items += [item(f"c.py::{at}", slow=True) for at in range(2)] + [item(f"d.py::{at}") for at in range(7)]
    found = dealt(items, workers)
    assert sorted(one.nodeid for one in found) == sorted(one.nodeid for one in items)
    parts = [found[len(items) * at // workers : len(items) * (at + 1) // workers] for at in range(workers)]
    for part in parts:
        speeds = [bool(one.get_closest_marker("slow")) for one in part]
        assert speeds[0] and speeds == sorted(speeds, reverse=True)
    # Tests of one file may share what takes long.
    at = [one.nodeid for one in found].index("c.py::0")
    assert found[at + 1].nodeid == "c.py::1"


def test_more_slow_tests_than_a_part_holds():
    items = [item(f"a.py::{at}", slow=True) for at in range(5)] + [item("b.py::0")]
    assert sorted(one.nodeid for one in dealt(items, 2)) == sorted(one.nodeid for one in items)
