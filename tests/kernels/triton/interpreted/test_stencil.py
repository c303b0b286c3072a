"""Stencils by Triton's interpreter: the kernels' arithmetic and addresses, without a GPU."""

from __future__ import annotations

import pytest

from attnkit.kernels.triton.stencil import configs
from attnkit.kernels.triton.stencil.configs import Config
from tests.kernels.triton.stencil_cases import CASES, check


@pytest.fixture(autouse=True)
def small_patches(monkeypatch):
    """So that a small problem has several, and columns that do not fill a tile."""
    monkeypatch.setattr(
        configs, "configuration", lambda direction, *_: Config(32 if "learned" in direction else 16, 16, 1, 1)
    )


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name):
    check(CASES[name], "cpu", grad=False)
