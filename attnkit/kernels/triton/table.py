"""Table: configurations kept as data, a JSON file a family of kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar


class Table:
    """Configurations by class of devices and then by the names of a spot, as a JSON file has them.

    A class has lines only where it departs from the class `default`. A table is read when it is made, at import: the
    first call may already be one that is being compiled, where nothing can be read.

    Args:
        path: the file.
    """

    _made: ClassVar[dict[Path, Table]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._made.setdefault(path, self)

    @classmethod
    def of(cls, path: Path) -> Table:
        """The table that this process read first from a file: the one that kernels take their lines from."""
        return cls._made.get(path) or cls(path)

    def spots(self) -> list[tuple[str, ...]]:
        """Where `default` has lines, which is everywhere, in the order of the file."""
        return list(_spots(self._lines["default"], ()))

    def own(self, device_class: str, spot: Sequence[str]) -> list[int] | None:
        """The line that a class of devices has for itself, None where it has `default`'s."""
        table = self._lines.get(device_class, {})
        for name in spot:
            table = table.get(name, {})
        return list(table) if table else None

    def line(self, device_class: str, spot: Sequence[str]) -> list[int]:
        """The line that holds for a class of devices."""
        found = self.own(device_class, spot) or self.own("default", spot)
        assert found is not None, spot
        return found

    def put(self, device_class: str, spot: Sequence[str], line: Sequence[int] | None) -> None:
        """Gives a class of devices a line of its own in this process's table, or with None takes it away."""
        path = [self._lines]
        for name in (device_class, *spot[:-1]):
            path.append(path[-1].setdefault(name, {}))
        if line is not None:
            path[-1][spot[-1]] = list(line)
        else:
            path[-1].pop(spot[-1], None)
            for table, name in reversed([*zip(path, (device_class, *spot), strict=True)]):
                if not table.get(name, True):
                    del table[name]

    def written(self) -> str:
        """This process's table as the text of its file, with the lines of the last name beside each other."""
        return _written(self._lines, 0) + "\n"

    def save(self) -> None:
        """Writes this process's table to its file, never half of it."""
        part = self.path.with_suffix(".part")
        part.write_text(self.written(), encoding="utf-8")
        part.replace(self.path)


def _spots(table: dict[str, Any], before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, one in table.items():
        if isinstance(one, list):
            yield (*before, name)
        else:
            yield from _spots(one, (*before, name))


def _written(table: dict[str, Any], indent: int) -> str:
    if all(isinstance(one, list) for one in table.values()):
        return json.dumps(table)
    parts = [f"{' ' * (indent + 2)}{json.dumps(name)}: {_written(one, indent + 2)}" for name, one in table.items()]
    return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
