"""Fewer rows than a full cross of parameters, in which any two values still meet.

A mistake nearly always shows with one value, or with two together. The full cross is run where ATTNKIT_CROSSES=all, as
by `make crosses`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection
from typing import Any


def pairs(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Rows of a table in which any two values of two axes stand in one row, about as few as there can be.

    Args:
        axes: two or more, each with the values of one parameter.

    Returns:
        Rows with one value of each axis: of two axes all, of more some, in the order of the full cross.
    """
    sizes = [range(len(axis)) for axis in axes]

    def met(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    left = {row: met(row) for row in itertools.product(*sizes)}
    missing = set().union(*left.values())
    taken = []
    while missing:
        row = max(left, key=lambda row: len(left[row] & missing))
        missing -= left.pop(row)
        taken.append(row)
    values = [list(axis) for axis in axes]
    return [tuple(axis[at] for axis, at in zip(values, row, strict=True)) for row in sorted(taken)]


def met(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Parameters of a test: `pairs` of the axes, or their full cross where ATTNKIT_CROSSES=all."""
    return list(itertools.product(*axes)) if os.environ.get("ATTNKIT_CROSSES") == "all" else pairs(*axes)
