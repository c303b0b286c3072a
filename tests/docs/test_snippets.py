"""Every Python example in the README and the documentation runs as printed.

The examples of one file run in order in one namespace, in an empty working directory. An example under
`<!-- no-run -->` is only compiled.
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest

from attnkit import registry
from attnkit.kernels import dispatch

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"(?P<skip><!-- *no-run *-->\s*\n)?"
    r"^(?P<indent>[ \t]*)```(?:python|py)\b[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


class Snippet(NamedTuple):
    line: int
    code: str
    runs: bool


def snippets(page: str) -> list[Snippet]:
    return [
        Snippet(page.count("\n", 0, found.start("code")), textwrap.dedent(found["code"]), not found["skip"])
        for found in FENCE.finditer(page)
    ]


@pytest.fixture
def registered_things_forgotten():
    """Takes back what an example registers, which other tests of this process would meet."""
    known, backends = set(registry.list_primitives()), dict(registry.BACKENDS)
    yield
    for name in set(registry.BACKENDS) - set(backends):
        del registry.BACKENDS[name]
        dispatch._backends.pop(name, None)
    for name in set(registry.list_primitives()) - known:
        registry.unregister_primitive(name)


@pytest.mark.usefixtures("registered_things_forgotten")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if snippets(page.read_text(encoding="utf-8"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Drawing must not look for a display.
    monkeypatch.setenv("MPLBACKEND", "agg")
    # A real module, so that dataclasses and pickle find what an example defines.
    module = types.ModuleType("snippets_" + re.sub(r"\W", "_", str(page.relative_to(ROOT))))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for snippet in snippets(page.read_text(encoding="utf-8")):
        # Blank lines in front make a traceback show the line of the page.
        code = compile("\n" * snippet.line + snippet.code, str(page), "exec", dont_inherit=True)
        if snippet.runs:
            exec(code, module.__dict__)


def test_snippets_are_found_with_their_lines():
    page = (
        "# t\n```python\na = 1\n```\n\n"
        "<!-- no-run -->\n\n```python\nb\n```\n\n"
        "=== tab\n    ```py\n    c = 3\n    ```\n"
        "```bash\nls\n```\n"
    )
    assert snippets(page) == [
        Snippet(2, "a = 1\n", True),
        Snippet(8, "b\n", False),
        Snippet(13, "c = 3\n", True),
    ]
