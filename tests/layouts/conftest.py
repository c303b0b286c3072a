"""What the tests of layouts share."""

from __future__ import annotations

import pytest

from attnkit import Grid


@pytest.fixture
def grid_of_four():
    return Grid(2, 2)
