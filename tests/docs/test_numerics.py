"""The page on numerics: it shows the numbers that lie beside it, and the script still measures what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from attnkit.testing import HARD_INPUTS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def numerics():
    spec = importlib.util.spec_from_file_location("numerics", DOCS / "generate" / "numerics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_numbers(numerics):
    numbers = json.loads(numerics.NUMBERS.read_text(encoding="utf-8"))
    shown = numerics.PAGE.read_text(encoding="utf-8").partition(numerics.BEGIN)[2].partition(numerics.END)[0]
    assert shown.strip() == numerics.page(numbers)


def test_every_input_dtype_and_backend_was_measured(numerics):
    numbers = json.loads(numerics.NUMBERS.read_text(encoding="utf-8"))
    found = {(one["input"], one["dtype"], one["by"]) for one in numbers["errors"]}
    dtypes = [numerics.short(dtype) for dtype in numerics.DTYPES]
    people = ["rounded", "by hand", *(name for name in numerics.COMPUTED if name != "flex")]
    assert found >= {(hard.name, dtype, who) for hard in HARD_INPUTS for dtype in dtypes for who in people}
    assert ("flex", "ordinary") in {(by, name) for name, _, by in found}


def test_an_input_is_measured(numerics):
    hard = next(hard for hard in HARD_INPUTS if hard.name == "all keys masked")
    records = {one["by"]: one for one in numerics.measure_input(hard, torch.float64)}
    assert list(records) == ["rounded", "by hand", "reference", "sdpa", "chunked", "gather"]
    assert records["rounded"]["out"] == records["rounded"]["gradient"] == 0.0
    assert all(one["out"] < 1e-13 and one["gradient"] < 1e-13 for one in records.values())
    assert records["gather"]["out under"] in hard.layouts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learned_queries_beside_the_published_computation(numerics, dtype):
    """All agree where scores are small, and only attnkit's stays right where they are large."""
    eps = torch.finfo(dtype).eps
    small = {one["by"]: one for one in numerics.measure_learned_query(3.0, dtype)}
    assert all(one["lost"] == 0.0 and one["out"] < 16 * eps for one in small.values())
    large = {one["by"]: one for one in numerics.measure_learned_query(1000.0, dtype)}
    assert large["attnkit"]["lost"] == 0.0
    assert large["attnkit"]["out"] < max(2 * eps, 1e-4)
    assert large["exp"]["lost"] > 0.5
    assert large["exp, shifted"]["lost"] > 0.5


def test_one_shift_for_the_whole_image_is_wrong_in_silence(numerics):
    """Small terms of windows far below the largest score are lost before whole windows are."""
    found = {one["by"]: one for one in numerics.measure_learned_query(100.0, torch.float32)}
    assert found["exp, shifted"]["out"] > 1000 * found["attnkit"]["out"]


def test_memory_is_measured(numerics):
    small, large = (numerics.measure_memory(kernel) for kernel in (3, 15))
    assert large["logits"] == pytest.approx(25 * small["logits"], rel=0.05)
    assert large["kept"] < 1.2 * small["kept"]
    assert large["training"] < 1.5 * small["training"]


def test_cells(numerics):
    cells = [numerics.cell(one) for one in (None, 0.0, 3.4e-16, 0.05, 0.06, 12.0, "inf", "nan")]
    assert cells == ["", "0", "3e-16", "5e-2", "**6e-2**", "**1e+1**", "**inf**", "**NaN**"]
    shares = [numerics.lost_share(one) for one in (0.0, 0.0001, 0.5, 0.9999, 1.0)]
    assert shares == ["", "**1 % not finite**", "**50 % not finite**", "**99 % not finite**", "**nothing finite**"]
