"""The documentation follows the code: gallery pages, reference entries, printed numbers."""

from __future__ import annotations

import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest

import attnkit
from attnkit.options import field_types

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PUBLIC = [
    "attnkit",
    "attnkit.layouts",
    "attnkit.kernels",
    "attnkit.primitives",
    "attnkit.analysis",
    "attnkit.testing",
    "attnkit_models",
]


def generator(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "generate" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gallery() -> types.ModuleType:
    return generator("gallery")


@pytest.mark.parametrize("name", attnkit.list_primitives())
def test_every_primitive_has_a_page_with_pictures(gallery, name):
    page, pictures = gallery.page(name), gallery.pictures(name)
    assert page.startswith(f"# {name}\n")
    for title in ("Formula", "Options", "Use", "Cost", "Paper"):
        assert f"\n## {title}\n" in page
    assert "not given" not in page
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert set(re.findall(r"\]\((\S+\.png)\)", page)) | {f"{name}.png"} == set(pictures)


@pytest.mark.parametrize("name", attnkit.list_primitives())
def test_every_option_is_explained(gallery, name):
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.*) \|$", gallery.page(name), re.MULTILINE)
    assert {row[0] for row in rows} == set(field_types(gallery.options_class(name)))
    assert all(meaning and kind and "typing" not in kind for _, kind, _, meaning in rows)


@pytest.mark.parametrize("name", attnkit.list_primitives())
def test_the_example_of_every_page_runs(gallery, name):
    (code,) = re.findall(r"```python\n(.*?)```", gallery.page(name), re.DOTALL)
    exec(code, {})


def test_the_index_shows_every_primitive(gallery):
    index = gallery.index()
    assert all(f'href="{name}/"' in index and f"{name}.png" in index for name in attnkit.list_primitives())


def test_a_primitive_without_examples_or_texts_still_gets_a_page(gallery, monkeypatch):
    monkeypatch.setattr(attnkit.Window, "examples", ())
    monkeypatch.setattr(attnkit.Window, "cost", "")
    assert "gives no formula" in gallery.page("window")


def public_names() -> list[tuple[str, str]]:
    return [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]


@pytest.mark.parametrize(("module", "name"), public_names(), ids=lambda value: value)
def test_every_public_name_has_a_reference_entry(module, name):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")}
    entries = set(re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE))
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, types.ModuleType):
        assert pages[name].startswith(f"# {module}.{name}\n")
        return
    places = {f"{module}.{name}", f"{getattr(value, '__module__', module)}.{name}"}
    places |= {f"attnkit.{name}"} if getattr(attnkit, name, None) is value else set()
    assert places & entries, f"{module}.{name} needs a line '::: {module}.{name}' in docs/reference"


def test_every_reference_entry_exists():
    for path in (DOCS / "reference").glob("*.md"):
        for entry in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), name), entry


def test_the_table_of_the_readme_is_what_flops_prints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(HeadMix on 14 x 14 tokens.*?)\n```", readme, re.DOTALL)
    groups = [attnkit.Conv(heads=2), attnkit.RandomWindow(heads=2, window=49), attnkit.PooledGlobal(heads=2, pool=4)]
    assert shown == str(attnkit.flops(attnkit.HeadMix(96, groups), 14))


def test_the_readme_lists_every_primitive():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == set(attnkit.list_primitives())


def test_the_table_of_models_holds_every_recipe():
    models = generator("models")
    table = models.PAGE.read_text(encoding="utf-8").partition(models.BEGIN)[2].partition(models.END)[0]
    rows = re.findall(r"^\| `(\w+)` \|.*$", table, re.MULTILINE)
    assert rows == attnkit.list_models()


@pytest.mark.parametrize("name", [*attnkit.list_models("*_micro"), "vit_tiny"])
def test_the_numbers_in_the_table_of_models_are_right(name):
    models = generator("models")
    assert models.row(name) in models.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_numbers_in_the_table_of_models_are_right():
    models = generator("models")
    assert models.table() in models.PAGE.read_text(encoding="utf-8")
