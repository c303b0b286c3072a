"""Grid: sizes, prefix, coordinates, strides and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid, HeadMix, Window
from attnkit.errors import AttnkitError, ShapeError

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(sizes=SIZES, prefix=st.integers(0, 5))
def test_counts(sizes, prefix):
    grid = Grid(*sizes, prefix=prefix)
    assert grid.sizes == tuple(sizes) and grid.prefix == prefix
    assert grid.ndim == len(sizes)
    assert grid.image_tokens == math.prod(sizes)
    assert grid.tokens == prefix + math.prod(sizes)
    assert grid.width == sizes[-1]
    assert grid.height == (sizes[-2] if len(sizes) > 1 else 1)


def test_height_and_width_by_name():
    assert Grid(height=3, width=5) == Grid(3, 5) == Grid(3, width=5)
    assert Grid(8, height=3, width=5, prefix=1) == Grid(8, 3, 5, prefix=1)
    assert Grid(width=196) == Grid(196)


@given(sizes=SIZES, prefix=st.integers(0, 5))
def test_repr_makes_the_grid_again(sizes, prefix):
    grid = Grid(*sizes, prefix=prefix)
    assert eval(repr(grid), {"Grid": Grid}) == grid
    assert ("prefix" in repr(grid)) == (prefix > 0)


@given(sizes=SIZES, prefix=st.integers(0, 2))
def test_equality_hash_and_copies(sizes, prefix):
    grid = Grid(*sizes, prefix=prefix)
    for other in (Grid(*sizes, prefix=prefix), pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
        assert other == grid and hash(other) == hash(grid)
    assert Grid(*sizes, prefix=prefix + 1) != grid
    assert Grid(*sizes, 1, prefix=prefix) != grid


def test_a_grid_does_not_change():
    grid = Grid(2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.sizes = (3, 2)


@given(sizes=SIZES, prefix=st.integers(0, 2))
def test_coords_are_row_major_and_without_prefix(sizes, prefix):
    coords = Grid(*sizes, prefix=prefix).coords()
    assert coords.dtype == torch.int64
    assert coords.tolist() == [list(place) for place in itertools.product(*map(range, sizes))]


def test_coords_on_another_device():
    coords = Grid(3, 4).coords("meta")
    assert coords.device.type == "meta" and coords.shape == (12, 2)


@given(sizes=SIZES, prefix=st.integers(0, 2), data=st.data())
def test_strided_keeps_every_stride_th_token(sizes, prefix, data):
    steps = data.draw(st.lists(st.integers(1, 7), min_size=len(sizes), max_size=len(sizes)))
    kept = [len(range(0, size, step)) for size, step in zip(sizes, steps, strict=True)]
    assert Grid(*sizes, prefix=prefix).strided(steps) == Grid(*kept, prefix=prefix)
    same = [len(range(0, size, 2)) for size in sizes]
    assert Grid(*sizes, prefix=prefix).strided(2) == Grid(*same, prefix=prefix)


def test_a_finer_grid():
    assert Grid(3, 5, prefix=2).refined(2) == Grid(6, 10, prefix=2)
    assert Grid(4).refined((3,)) == Grid(12)
    with pytest.raises(ShapeError, match=r"scale is an integer >= 1 or one per axis of Grid\(3, 5\), but got 0"):
        Grid(3, 5).refined(0)


def test_per_axis():
    grid = Grid(4, 5, 6)
    assert grid.per_axis(3, "window") == (3, 3, 3)
    assert grid.per_axis([1, 2, 3], "window") == (1, 2, 3)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ((), "()"),
        ((0,), "(0,)"),
        ((3, -1), "(3, -1)"),
        ((3.0, 4), "(3.0, 4)"),
        ((True, 4), "(True, 4)"),
        (("3", 4), "('3', 4)"),
        (((3, 4),), "((3, 4),)"),
        ((None,), "(None,)"),
    ],
)
def test_refused_sizes(sizes, said):
    with pytest.raises(ShapeError) as caught:
        Grid(*sizes)
    assert said in str(caught.value) and ">= 1" in str(caught.value)
    assert isinstance(caught.value, AttnkitError) and isinstance(caught.value, ValueError)


def test_refused_keywords():
    for wrong in ({"height": 0, "width": 3}, {"height": 2.5, "width": 3}, {"width": -1}):
        with pytest.raises(ShapeError, match=">= 1"):
            Grid(**wrong)


@pytest.mark.parametrize("prefix", [-1, 1.0, True, None, "1"])
def test_refused_prefix(prefix):
    with pytest.raises(ShapeError) as caught:
        Grid(2, 2, prefix=prefix)
    assert "prefix" in str(caught.value) and repr(prefix) in str(caught.value)


@pytest.mark.parametrize("stride", [0, -2, 1.5, True, (2,), (2, 2, 2), (2, 0), "2", None])
def test_refused_strides(stride):
    with pytest.raises(ShapeError) as caught:
        Grid(4, 6).strided(stride)
    assert repr(stride) in str(caught.value) and "Grid(4, 6)" in str(caught.value)


def test_options_for_another_number_of_axes_are_told_with_the_grid():
    mix = HeadMix(8, [Window(2, (3, 3, 3))])
    with pytest.raises(
        ShapeError, match=r"^window is an integer >= 1 or one per axis of Grid\(4, 5\), but got \(3, 3, 3\)$"
    ):
        mix(torch.zeros(1, 4, 5, 8))
    assert mix(torch.zeros(1, 2, 4, 5, 8)).shape == (1, 2, 4, 5, 8)


def test_token_counts_that_disagree():
    Grid(3, 4, prefix=1).check_tokens(13)
    with pytest.raises(ShapeError, match=r"x has 12 tokens but Grid\(3, 4, prefix=1\) holds 1 prefix \+ 3\*4 = 13"):
        Grid(3, 4, prefix=1).check_tokens(12)
    with pytest.raises(ShapeError, match=r"keys has 7 tokens but Grid\(2, 3\) holds 2\*3 = 6"):
        Grid(2, 3).check_tokens(7, "keys")
