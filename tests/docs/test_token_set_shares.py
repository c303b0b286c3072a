"""What the page on Triton says that shared tiles visit, multiply and fetch was counted, and the choice rests on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnkit.kernels.triton.token_sets.shares import TESTED, expected_share

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "token-sets"
KEEP = (0.25, 0.1, 0.05)
TOKENS = (196, 784)
# The order that tiles have, and for random lists, whose queries are in no groups.
ORDERS = {
    "queries": ("leading basis row", "image"),
    "keys": ("how many queries see them", "how many queries see them"),
}
PASSES = {
    "forward": "forward",
    "query_gradient": "gradient of queries",
    "key_gradient": "gradients of keys and values",
}


@pytest.fixture(scope="module")
def page():
    """The lines of the page."""
    return [line.strip() for line in (ROOT / "docs" / "triton.md").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def cases():
    return json.loads((RESULTS / "unions.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def counted(cases):
    about = ("tokens", "keys", "keep", "tiles of", "order")
    return {tuple(one[name] for name in about): one["visited"]["64"] for one in cases}


def percent(share):
    return f"{share:.0%}".replace("%", " %")


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("side", ORDERS)
def test_the_page_shows_what_tiles_visit(counted, page, side, tokens, keep):
    own, random = ORDERS[side]
    kinds = (("trained", "image"), ("trained", own), ("trained", "largest direction"), ("random", random))
    shares = [percent(counted[tokens, keys, keep, side, order]) for keys, order in kinds]
    assert f"| {tokens} | {' | '.join([percent(keep), *shares])} |" in page


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("side", ORDERS)
def test_the_orders_that_tiles_have_spare_something(counted, side, tokens, keep):
    own, _ = ORDERS[side]
    ordered, image = (counted[tokens, "trained", keep, side, order] for order in (own, "image"))
    assert ordered < image * (0.94 if side == "queries" else 0.7)


def test_the_page_tells_how_much_was_learned(cases, page):
    short, long = ({one["tokens"]: one for one in cases}[tokens] for tokens in TOKENS)
    told = (
        f"went on from 196 tokens for {long['steps']} batches of {long['batch']} images, to "
        f"{percent(long['accuracy'])} accuracy ({percent(short['accuracy'])} at 196 tokens, after {short['steps']} "
        f"batches of {short['batch']}), and its predictors had {long['predictor steps']} such batches instead of "
        f"{short['predictor steps']} of {short['batch']}."
    )
    assert told in " ".join(page)


@pytest.mark.parametrize("keep", KEEP)
def test_the_choice_expects_what_was_counted(counted, keep):
    for tokens in TOKENS:
        image, grouped = (
            counted[tokens, "trained", keep, "queries", order] for order in ("image", "leading basis row")
        )
        assert expected_share(keep, True) == pytest.approx(grouped, rel=0.2)
        assert expected_share(keep, False) == pytest.approx(image, rel=0.25)
        # So little that dense attention multiplies more.
        assert grouped < image < 1 / TESTED


def test_the_page_shows_what_shared_tiles_spare(page):
    found = json.loads((RESULTS / "shared.json").read_text(encoding="utf-8"))
    about = [found[name] for name in ("model", "layers", "images", "tokens", "tokens of a region", "topk")]
    assert about == ["biformer_tiny", 8, 2, 196, 4, 16]
    for case in found["cases"]:
        for way in ("own", "shared"):
            numbers = [f"{case[way][name]:,.0f}" for name in ("programs", "pairs", "rows")]
            assert f"| {PASSES[case['pass']]}, {way} tiles | {' | '.join(numbers)} |" in page
