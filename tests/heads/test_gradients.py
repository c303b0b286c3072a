"""Every primitive in a mix: gradients reach every parameter, and batch items stay apart."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid
from attnkit.testing import random_tensor

GRIDS = [Grid(3, 4), Grid(5, 3, prefix=2)]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_gets_a_finite_gradient(primitive, small_mix, grid, training):
    mix = small_mix(primitive).train(training)
    x = random_tensor(2, grid.tokens, 12, seed=0, dtype=torch.float32, grad=True)
    weights = random_tensor(2, grid.tokens, 12, seed=1, dtype=torch.float32)
    (mix(x, grid) * weights).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(-1).all()
    for name, parameter in mix.named_parameters():
        if ".predictor." in name:
            # Trained by imitation of a teacher, as in its paper; the choice of keys is hard.
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_batch_items_do_not_see_each_other(primitive, small_mix, grid):
    mix = small_mix(primitive).double()
    x = random_tensor(3, grid.tokens, 12, seed=0)
    other = x.clone()
    other[1] = random_tensor(grid.tokens, 12, seed=7)
    one, two = mix(x, grid), mix(other, grid)
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one[1], two[1])
    torch.testing.assert_close(mix(x[1:2], grid), one[1:2], rtol=1e-12, atol=1e-12)


def test_gradients_do_not_cross_batch_items(primitive, small_mix):
    mix = small_mix(primitive).double()
    x = random_tensor(3, 12, 12, seed=0, grad=True)
    mix(x, Grid(3, 4))[1].sum().backward()
    assert not x.grad[[0, 2]].any() and x.grad[1].any()
