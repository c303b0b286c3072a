"""Where a full cross is not run, any two values still meet."""

from __future__ import annotations

import itertools

import pytest

from tests.crossing import pairs


@pytest.mark.parametrize(
    ("axes", "most"),
    [
        (("abc", "xy"), 6),
        (("abcdefg", "xy", "01"), 14),
        (("abcde", "uvwxyz", "01"), 30),
        ((range(4), range(3), range(3), range(2)), 14),
    ],
)
def test_any_two_values_meet(axes, most):
    rows = pairs(*axes)
    assert len(rows) == len(set(rows)) <= most
    for (one, first), (other, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(first, second))
