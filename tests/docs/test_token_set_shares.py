"""What the page on Triton says that tiles of token sets visit is what was counted, and the choice rests on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnkit.kernels.triton.token_sets.shares import expected_share

ROOT = Path(__file__).parents[2]
KEEP = (0.25, 0.1, 0.05)


@pytest.fixture(scope="module")
def counted():
    path = ROOT / "benchmarks" / "results" / "token-sets" / "unions.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return {(case["keys"], case["keep"], case["order"]): case["visited"]["64"] for case in cases}


def test_the_page_shows_what_was_counted(counted):
    page = " ".join((ROOT / "docs" / "triton.md").read_text(encoding="utf-8").split())
    trained, random, moved = (
        [f"{counted[keys, keep, order]:.0%}".replace("%", " %") for keep in KEEP]
        for keys, order in (("trained", "image"), ("random", "image"), ("trained", "largest direction"))
    )
    assert f"visit {trained[0]} of all pairs where each query has a quarter of the keys, {trained[1]} where it" in page
    assert f"where it has a tenth and {trained[2]} where it has a twentieth; with random lists {random[0]}," in page
    assert f"{random[0]}, {random[1]} and {random[2]}. Queries sorted" in page
    assert f"would leave {moved[0]}, {moved[1]} and {moved[2]}," in page


@pytest.mark.parametrize("keep", KEEP)
def test_the_choice_expects_what_was_counted(counted, keep):
    assert expected_share(keep) == pytest.approx(counted["trained", keep, "image"], rel=0.2)
