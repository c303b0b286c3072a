"""How many cases the laws are tried on: a short profile by default, `make laws` for many."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def examples():
    """Number of cases per law and primitive, layout or backend."""
    return int(os.environ.get("ATTNKIT_LAWS_EXAMPLES") or 12)
