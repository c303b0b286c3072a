"""Every law for every registered primitive, on any options of it."""

from __future__ import annotations

import pytest

from attnkit.registry import list_primitives
from attnkit.testing import LAWS, check_primitive

# The laws of single attention calls do not concern a convolution; they hold for it without having been tried on much.
PAIRS = [(name, law.name) for name in list_primitives() for law in LAWS.values() if law.primitive is not None]


@pytest.mark.parametrize(("primitive", "law"), PAIRS)
def test_law(primitive, law, examples):
    checked = check_primitive(primitive, laws=[law], max_examples=examples)
    assert checked.tried[law] + checked.refused[law] >= examples
