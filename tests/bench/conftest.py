"""Results of these tests depend neither on the checkout nor on large images."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_and_repeatable(monkeypatch):
    monkeypatch.setattr("attnkit_models.bench.machine.commit", lambda: "0123456789")
    monkeypatch.setattr("attnkit_models.bench.run.commit", lambda: "0123456789")
    monkeypatch.setattr("attnkit_models.bench.model_problems.CHECKED_SIZE", 32)
