"""The page on kernels: what was compiled is what would be started now, and the page shows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from attnkit.kernels.triton.blocks import sweep
from attnkit.kernels.triton.devices import SHARED

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("kernels_page", DOCS / "generate" / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_numbers(kernels):
    assert kernels.PAGE.read_text(encoding="utf-8") == kernels.text(kernels.stored()), "run: make kernels"


def test_the_numbers_are_of_these_kernels_and_this_table(kernels):
    assert kernels.stored()["fingerprint"] == sweep.fingerprint(), "kernels or configs.json changed; run: make kernels"


def test_the_lines_that_the_page_promises_were_compiled_and_fit(kernels):
    lines = kernels.stored()["lines"]
    assert set(lines) <= {kernels.key(line) for line in sweep.lines()}
    promised = sweep.lines(("sm_90",), ("bfloat16",))
    assert set(lines) >= {kernels.key(line) for line in promised if not line.bias}
    for name, (registers, aside, shared, instructions) in lines.items():
        device = name.partition("/")[0]
        assert 0 < registers <= (512 if device == "gfx942" else 255)
        assert aside <= sweep.TRIFLE
        assert shared <= SHARED[device]
        assert instructions or "float32" in name


def test_the_page_says_what_is_missing(kernels):
    text = kernels.PAGE.read_text(encoding="utf-8")
    for mark in (kernels.BEGIN, kernels.END, kernels.LIMITS, kernels.LIMITS_END):
        assert text.count(mark) == 1
    assert "were not measured on a GPU yet" in text
