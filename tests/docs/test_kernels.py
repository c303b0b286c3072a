"""The page on kernels: what was compiled is what would be started now, it fits, and the page shows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED
from attnkit.kernels.triton.sweeping import MOST_REGISTERS, TRIFLE, families

DOCS = Path(__file__).parents[2] / "docs"
FAMILIES = families()
# Tables of kernels that have no products of matrices.
WITHOUT_PRODUCTS = ("lists", "learned_forward")
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("kernels_page", DOCS / "generate" / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_folder_of_kernels_is_a_family():
    assert "blocks" in FAMILIES


def test_the_page_shows_the_numbers(kernels):
    assert kernels.PAGE.read_text(encoding="utf-8") == kernels.text(), "run: make kernels"


@each_family
def test_the_numbers_are_of_these_kernels_and_this_table(kernels, family):
    found = kernels.stored(family).get("fingerprint")
    assert found == FAMILIES[family].fingerprint(), f"kernels changed; run: make kernels ARGS=\"--only '{family}/*'\""


@each_family
def test_names_have_a_place_in_the_tables(kernels, family):
    sweep = FAMILIES[family]
    for name, lines in kernels.named(sweep).items():
        device, table, *row, column = name.split("/")
        assert device in DEVICE_CLASSES and table in sweep.TABLES
        assert len(row) == len(sweep.ROWS) and column in sweep.COLUMNS
        assert len({sweep.cut(line) for line in lines[:1]}) == 1 and {line.device_class for line in lines} == {device}


@each_family
def test_what_was_compiled_fits(kernels, family):
    lines = kernels.stored(family)["lines"]
    assert set(lines) == set(kernels.named(FAMILIES[family]))
    for name, (_, registers, aside, shared, _, faults) in lines.items():
        device = name.partition("/")[0]
        assert not faults, name
        assert 0 < registers <= (512 if device == "gfx942" else MOST_REGISTERS), name
        assert aside <= TRIFLE, name
        assert shared <= SHARED[device], name


@each_family
def test_products_are_made_by_tensor_cores(kernels, family):
    for name, row in kernels.stored(family)["lines"].items():
        device, table, numbers = name.split("/")[:3]
        exact = numbers.startswith("float32") and device != "gfx942"
        assert bool(row[4]) is not (exact or table in WITHOUT_PRODUCTS), name


def test_a_family_that_was_not_compiled_is_shown_as_such(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "TABLES", tmp_path)
    assert kernels.tables("blocks", FAMILIES["blocks"]).endswith("Not compiled yet.")


def test_lines_that_do_not_fit_are_marked(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "TABLES", tmp_path)
    fits, spills = (["64x64, 4 w, 2 s", 255, aside, 2048, "mma", faults] for aside, faults in ((0, []), (56, ["a"])))
    lines = {"sm_80/forward/bfloat16/32/64": fits, "sm_80/forward/bfloat16/32/128": spills}
    kernels.write("blocks", {"fingerprint": "", "triton": "1.0", "lines": lines})
    page = kernels.tables("blocks", FAMILIES["blocks"])
    assert "| 64x64, 4 w, 2 s: 255, 2 K, mma | 64x64, 4 w, 2 s: 255 + 56 B, 2 K, mma **(does not fit)** |" in page
    assert kernels.MISSING in page
    assert [one for one in kernels.wrong() if one.startswith("blocks: ")] == ["blocks: a"]


def test_a_line_tells_the_most_that_its_kernels_need_and_all_that_is_wrong(kernels, monkeypatch):
    lines = [line for line in FAMILIES["blocks"].lines() if line[:5] == ("sm_80", "forward", "bfloat16", 64, 32)]
    lines = [line for line in lines if not line.bias]
    assert {line.kind for line in lines} == {"whole", "ragged", "prefix", "windows"}
    launch = SimpleNamespace(kernel=SimpleNamespace(__name__="kernel"))

    def needs(line):
        if line.kind == "windows":
            raise RuntimeError("no\nmore")
        spilled = 24 if line.kind == "ragged" else 0
        found = (255, spilled, 64, ("mma",)) if spilled else (80, 0, 128, ("mma", "wgmma"))
        return [SimpleNamespace(launch=launch, compiled=found, faults=("spills",) * (spilled > 0))]

    monkeypatch.setattr(FAMILIES["blocks"], "needs", needs)
    family, name, row = kernels.needed(("blocks", "name", lines))
    assert (family, name, row[1:5]) == ("blocks", "name", [255, 24, 128, "mma, wgmma"])
    assert row[0].endswith(" s")
    words = "sm_80 forward bfloat16 64 32"
    assert row[5] == [f"{words} ragged False, kernel: spills", f"{words} windows False: RuntimeError: no"]


def test_the_page_says_what_is_missing(kernels):
    text = kernels.PAGE.read_text(encoding="utf-8")
    for mark in (kernels.BEGIN, kernels.END, kernels.LIMITS, kernels.LIMITS_END):
        assert text.count(mark) == 1
    assert "were not measured on a GPU yet" in text
