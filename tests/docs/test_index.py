"""The first page: its cards lead to pages, on the site and in the repository."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
# Made when the site is built.
GENERATED = {"gallery/index"}


def test_cards_lead_to_pages():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    targets = re.findall(r"^\[\*\*.+\]\(([^)]+)\.md\)\{ \.card \}$", index, re.MULTILINE)
    assert len(targets) == len(set(targets)) == index.count(".card }") > 7
    assert [one for one in targets if one not in GENERATED and not (DOCS / f"{one}.md").is_file()] == []
    assert {"learn/first-block", "gallery/index", "training", "triton", "benchmarks"} <= set(targets)
