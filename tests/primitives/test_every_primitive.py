"""What holds for every registered primitive, whatever its options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attnkit import Grid
from attnkit.registry import list_primitives, primitive_class
from attnkit.testing import random_options, random_tensor
from attnkit.testing.strategies import grids, seeds

NAMES = list_primitives()


def drawn(name, grid, seed, **fixed):
    """Random options that fit the grid."""
    if name.startswith("mask_") or name.endswith("mask_predictor"):
        fixed["prefix"] = grid.prefix if seed % 2 else 0
    return random_options(name, seed=seed, **fixed)


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_the_grid_of_the_output(name, random_mix, grid, seed):
    options = drawn(name, grid, seed)
    mix = random_mix(options, seed=seed)
    found = mix.run(random_tensor(2, grid.tokens, mix.dim, seed=seed), grid)
    assert found.grid == grid.strided(options.output_stride()).refined(options.output_scale())
    assert found.x.shape == (2, found.grid.tokens, mix.dim)
    if not grid.prefix:
        image = random_tensor(2, *grid.sizes, mix.dim, seed=seed)
        assert mix(image).shape == (2, *found.grid.sizes, mix.dim)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_numerically(name, random_mix):
    """Against finite differences, so that nothing here rests on a second implementation."""
    grid = Grid(2, 3, prefix=1)
    mix = random_mix(drawn(name, grid, 4, heads=2), seed=4)
    x = random_tensor(1, grid.tokens, mix.dim, seed=4, grad=True)
    assert torch.autograd.gradcheck(lambda x: mix(x, grid), (x,), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_its_documentation_needs(name):
    options = primitive_class(name)
    assert options.kind == name
    assert "arXiv" in options.paper
    assert options.formula
    assert options.cost
    assert options.__doc__
    assert "Args:" in options.__doc__
