"""The first page: its cards, whose links are HTML that the strict build does not check, lead to pages."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
# Made when the site is built.
GENERATED = {"gallery"}


def test_cards_lead_to_pages():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    targets = re.findall(r'<a class="card" href="([^"]+)/">', index)
    assert len(targets) == len(set(targets)) == index.count('class="card"')
    assert [one for one in targets if one not in GENERATED and not (DOCS / f"{one}.md").is_file()] == []
    assert {"learn/first-block", "gallery", "training", "triton", "benchmarks"} <= set(targets)
