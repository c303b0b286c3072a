"""The README's picture of patterns: its caption says how many primitives it shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from attnkit.registry import list_primitives

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {6: "six", 7: "seven", 8: "eight", 11: "eleven", 12: "twelve", 13: "thirteen", 17: "seventeen", 18: "eighteen"}


def test_the_caption_counts_what_is_shown():
    spec = importlib.util.spec_from_file_location("patterns_picture", DOCS / "generate" / "patterns.py")
    patterns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patterns)
    everything, variants = list_primitives(), patterns.VARIANTS
    assert set(variants) < set(everything) and not set(variants) & set(patterns.FIRST)
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    shown = len(everything) - len(variants)
    assert f"So {WORDS[len(everything)]} ways of choosing keys" in readme
    assert f"sees under {WORDS[shown]} of them; the other {WORDS[len(variants)]} are variants" in readme
    # A tile each, one for the made-up picture.
    assert len(patterns.draw_patterns().axes) == shown + 1
