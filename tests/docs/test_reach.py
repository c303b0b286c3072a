"""The page on reach: its formulas against counting, against what attnkit measures, and against its own table."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from attnkit.analysis import reach as attnkit_reach

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("reach_page", DOCS / "generate" / "reach.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_windows_hit_counted_by_hand(page):
    """All ways to choose 3 of 8 tokens, in windows of 2."""
    counts = [len({token // 2 for token in chosen}) for chosen in itertools.combinations(range(8), 3)]
    expected = {hit: counts.count(hit) / len(counts) for hit in set(counts)}
    found = {hit: share for hit, share in page.windows_hit(8, 2, 3) if share}
    assert found == pytest.approx(expected)


def test_two_layers_are_the_closed_form(page):
    for tokens, share in ((3136, 0.5404), (784, 0.9618), (196, 1.0)):
        others = 1 - page.missed(tokens, 49, 49)
        assert page.random_windows(tokens, 49, 2) == pytest.approx(49 / tokens + (1 - 49 / tokens) * others)
        assert page.random_windows(tokens, 49, 2) == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize("side", [3, 5, 6])
def test_pairs_far_from_each_other(page, side):
    counts: dict[tuple[int, int], int] = {}
    axis = [min(at + 1, side - 1) - max(at - 1, 0) + 1 for at in range(side)]
    for a, b, c, d in itertools.product(range(side), repeat=4):
        if max(abs(a - c), abs(b - d)) > 2:
            key = (axis[a] * axis[b], axis[c] * axis[d])
            counts[key] = counts.get(key, 0) + 1
    assert page.far_pairs(side) == counts


# Every draw is one of 28 windows a layer; what their mean may be off by was seen over 24 draws.
@pytest.mark.parametrize(
    ("kind", "layers", "tolerance"),
    [(0, 1, 1e-9), (0, 2, 0.01), (0, 3, 0.04), (1, 1, 0.001), (1, 2, 0.012), (1, 3, 0.001), (2, 1, 0), (2, 3, 0)],
)
def test_measured_is_predicted(page, kind, layers, tolerance):
    name = page.KINDS[kind]
    draws = 4 if tolerance > 0 else 1
    found = page.measured(name, 14, 7, 2, layers, draws)
    assert found == pytest.approx(page.predicted(name, 14, 7, layers), abs=tolerance)


def test_a_large_map_is_measured_too(page):
    """The first stage of `bigbird_vit`: 56 x 56 tokens in windows of 49."""
    outputs = range(100, 3136, 500)
    found = attnkit_reach(page.groups(page.KINDS[0], 49, 8), 56, 2, outputs=outputs).double().mean()
    assert found == pytest.approx(page.predicted(page.KINDS[0], 56, 49, 2), abs=0.06)


def test_the_table_shows_the_predictions(page):
    text = page.PAGE.read_text(encoding="utf-8").partition(page.BEGIN)[2].partition(page.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()[2:]]
    expected = [(case, kind) for case in page.CASES for kind in page.KINDS]
    assert len(rows) == len(expected)
    for row, ((side, window, _), kind) in zip(rows, expected, strict=True):
        assert row[:3] == [f"{side} x {side}", str(window), kind]
        for layers, cell in zip(page.LAYERS, row[3:], strict=True):
            assert cell.partition("(")[2] == page.percent(page.predicted(kind, side, window, layers)) + ")"
            shown = float(cell.split()[0].strip("> ")) if not cell.startswith(">") else 99.9
            assert shown / 100 == pytest.approx(page.predicted(kind, side, window, layers), abs=0.03)


def test_the_picture_is_drawn(page):
    numbers = {
        (*case, kind, layers): page.predicted(kind, case[0], case[1], layers)
        for case in page.DRAWN
        for kind in page.KINDS
        for layers in page.LAYERS
    }
    figure = page.draw(numbers)
    assert len(figure.axes) == 9 + 2
    assert torch.tensor([len(axes.lines) for axes in figure.axes[-2:]]).eq(6).all()
