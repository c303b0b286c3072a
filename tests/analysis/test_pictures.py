"""draw: every primitive, mix and layout gives a picture; mistakes are named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import attnkit
from attnkit import Grid, layouts
from attnkit.analysis.canvas import blend
from attnkit.analysis.palette import UNSEEN, channels
from attnkit.analysis.pictures import picture_rows
from attnkit.errors import ConfigError, ShapeError
from attnkit.registry import primitive_class
from attnkit.testing import KINDS, random_layout


@pytest.mark.parametrize("name", attnkit.list_primitives())
def test_every_primitive_has_examples_that_can_be_drawn(name):
    cls = primitive_class(name)
    assert cls.examples, f"{name} needs `examples` for its picture in the gallery"
    for example in cls.examples:
        (row,) = picture_rows(cls(**{"heads": 2, **example}))
        assert cls.__name__ in row.title and " of " in row.note
        assert len(row.tiles) == 4
        assert all(tile.shares.shape == (14, 14) and 0 < tile.shares.sum() <= 196 for tile in row.tiles)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_drawn_as_their_masks(kind):
    layout, (queries, keys) = random_layout(kind, Grid(5, 6), batch=1, heads=2, seed=5)
    if queries != keys:
        pytest.skip("queries on a grid of their own")
    (row,) = picture_rows(layout, Grid(5, 6), [(2, 3)], matrix=True)
    expected = layout.to_mask().float().mean((0, 1))
    assert row.mask is not None and torch.equal(row.mask, expected.expand(30, 30))
    assert torch.equal(row.tiles[0].shares, row.mask[15].view(5, 6))


def test_strided_layouts_are_drawn_from_their_queries():
    layout = layouts.Stencil(Grid(6, 8), 3, stride=2)
    (row,) = picture_rows(layout, query=(5, 7))
    assert row.tiles[0].spot == (4, 6)
    assert row.tiles[0].shares.sum() == 9


def test_a_mix_gets_a_row_per_group_and_a_block_that_of_its_mix():
    groups = [attnkit.Conv(heads=2), attnkit.Window(heads=2, window=3)]
    for what in (groups, attnkit.Mix(tuple(groups)), attnkit.HeadMix(32, groups), attnkit.Block(32, groups)):
        assert [row.title for row in picture_rows(what, Grid(6, 6))] == ["Conv(heads=2)", "Window(heads=2, window=3)"]
    plain = {"kind": "mix", "dim": 32, "groups": [group.to_dict() for group in groups]}
    assert len(picture_rows(plain, Grid(6, 6))) == 2
    assert picture_rows({"kind": "window", "heads": 2, "window": 3}, Grid(6, 6))[0].title == "Window(heads=2, window=3)"


def test_prefix_tokens_and_sequences_are_drawn():
    (row,) = picture_rows(attnkit.Window(heads=2, window=3), Grid(6, 6, prefix=2))
    assert row.tiles[0].prefix.tolist() == [1.0, 1.0]
    (row,) = picture_rows(attnkit.Window(heads=2, window=4), Grid(12), [5])
    assert row.tiles[0].spot == (0, 5) and row.tiles[0].shares[0].nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "grid", "note"),
    [
        (attnkit.Window(1, 3), (6, 6), "9 of 36 tokens"),
        (attnkit.Conv(1), (6, 6), "no softmax; 9 of 36 tokens"),
        (attnkit.PooledGlobal(1, 3), (6, 6), "4 averages of all 36 tokens"),
        (attnkit.Linformer(1, tokens=36, rank=36), (6, 6), "36 mixtures of all 36 tokens"),
        (attnkit.TopKRegion(1, 3, 2, pool="mean", pool_cells=1), (6, 6), "2 averages of 8 of 36 tokens"),
        # Each copy of a token is weighted by how well regions match, but is of that token.
        (attnkit.SoftTopKRegion(1, 3, 2), (6, 6), "8 of 36 tokens"),
        # Regions of 2 x 2 tokens: 11 of the 36 places in nine of them lie behind the edge.
        (attnkit.PaddedTopKRegion(1, 2, 9), (5, 5), "25 of 25 tokens and 11 padding zeros"),
        (attnkit.PaddedTopKRegion(1, 3, 2), (6, 6), "8 of 36 tokens"),
    ],
)
def test_the_note_says_what_keys_are(options, grid, note):
    assert picture_rows(options, grid, [(1, 1)])[0].note == note


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures_are_written(tmp_path, ending):
    figure = attnkit.draw(
        attnkit.Window(heads=2, window=3), Grid(6, 6), tmp_path / f"a{ending}", matrix=True, scene=True
    )
    assert (tmp_path / f"a{ending}").stat().st_size > 1000
    # The picture, four queries, and the mask.
    assert len(figure.axes) == 6


def test_a_sequence_is_written(tmp_path):
    attnkit.draw(attnkit.Window(heads=2, window=4), Grid(32), tmp_path / "a.png", matrix=True)


def test_the_colours_are_those_of_the_shares():
    colours = blend(torch.tensor([[0.0, 1.0]]), "#0072b2")
    assert torch.allclose(colours[0, 0], torch.tensor(channels(UNSEEN)))
    assert torch.allclose(colours[0, 1], torch.tensor(channels("#0072b2")))


def test_it_leaves_no_mark():
    state = torch.random.get_rng_state()
    mix = attnkit.HeadMix(32, [attnkit.RandomWindow(heads=2, window=4)]).train()
    after = torch.random.get_rng_state()
    attnkit.draw(mix, Grid(6, 6))
    attnkit.draw(attnkit.MaskPredictor(heads=2, tokens=36, keep=0.5), Grid(6, 6))
    assert not torch.equal(state, after) and torch.equal(torch.random.get_rng_state(), after)
    assert mix.training and int(mix.draws) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"what": "window"}, ConfigError, "'window'"),
        ({"what": attnkit.Window(heads=2, window=3), "query": (14, 0)}, ConfigError, r"\(14, 0\)"),
        ({"what": attnkit.Window(heads=2, window=3), "query": 196}, ConfigError, "196"),
        ({"what": attnkit.Window(heads=2, window=3), "grid": Grid(2, 3, 4)}, ShapeError, "two axes"),
        ({"what": attnkit.Window(heads=2, window=3), "path": "a.gif"}, ConfigError, "gif"),
        ({"what": attnkit.Window(heads=2, window=3), "path": "no/such/folder/a.png"}, ConfigError, "no/such/folder"),
        ({"what": attnkit.Window(heads=2, window=3), "grid": 0}, ShapeError, "0"),
        ({"what": layouts.Dense(30), "grid": Grid(5, 5)}, ShapeError, "30 keys"),
    ],
)
def test_mistakes_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        attnkit.draw(**arguments)


def test_no_display_and_no_global_state():
    code = (
        "import sys, attnkit; attnkit.draw(attnkit.Window(heads=2, window=3), attnkit.Grid(4, 4));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_analysis_does_not_import_matplotlib():
    code = "import sys, attnkit.analysis; assert 'matplotlib' not in sys.modules and attnkit.analysis.draw"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
