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
    return {(one["tokens"], one["keys"], one["keep"], one["order"]): one["visited"]["64"] for one in cases}


def percent(share):
    return f"{share:.0%}".replace("%", " %")


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_page_shows_what_tiles_visit(counted, page, tokens, keep):
    kinds = (("trained", "image"), ("trained", "largest direction"), ("random", "image"))
    shares = [percent(counted[tokens, keys, keep, order]) for keys, order in kinds]
    assert f"| {tokens} | {' | '.join([percent(keep), *shares])} |" in page


def test_the_page_shows_what_the_order_of_leading_basis_rows_would_leave(counted, page):
    found = {
        tokens: [percent(counted[tokens, "trained", keep, "leading basis row"]) for keep in KEEP] for tokens in TOKENS
    }
    told = [f"{one[0]}, {one[1]} and {one[2]} at {tokens}" for tokens, one in found.items()]
    assert " tokens and ".join(told) in " ".join(page)


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
    assert expected_share(keep) == pytest.approx(counted[196, "trained", keep, "image"], rel=0.2)
    # Where less was learned tiles visit more, and still so little that dense attention multiplies more.
    assert expected_share(keep) < counted[784, "trained", keep, "image"] < 1 / TESTED


def test_the_page_shows_what_shared_tiles_spare(page):
    found = json.loads((RESULTS / "shared.json").read_text(encoding="utf-8"))
    about = [found[name] for name in ("model", "layers", "images", "tokens", "tokens of a region", "topk")]
    assert about == ["biformer_tiny", 8, 2, 196, 4, 16]
    for case in found["cases"]:
        for way in ("own", "shared"):
            numbers = [f"{case[way][name]:,.0f}" for name in ("programs", "pairs", "rows")]
            assert f"| {PASSES[case['pass']]}, {way} tiles | {' | '.join(numbers)} |" in page
