"""Draws of a mix: who counts them, what a number handed in does, and that PyTorch's random state is left alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnkit import Block, Dense, Grid, HeadMix, RandomWindow
from attnkit.primitives import HeadInputs
from attnkit.testing import random_tensor

GRID = Grid(4, 6)


def windows(mix, grid=GRID, draw=None, batch=1):
    """The permutation of a mix's first group."""
    x = torch.zeros(batch, grid.tokens, mix.dim)
    return mix.groups[0].permutation(HeadInputs(x, None, None, None, grid, None, draw)).tolist()


def mix_of(*, layer=0, seed=0, resample=1, window=5):
    return HeadMix(8, [RandomWindow(2, window, seed=seed, resample=resample)], layer=layer)


def tokens(batch=2, seed=0, grid=GRID):
    return random_tensor(batch, grid.tokens, 8, seed=seed, dtype=torch.float32)


def test_training_draws_anew_and_counts():
    mix = mix_of().train()
    with torch.no_grad():
        outputs = [mix(tokens(), GRID) for _ in range(4)]
    assert mix.draws.item() == 4
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(outputs))
    drawn = {tuple(windows(mix, draw=torch.tensor(draw))) for draw in range(20)}
    assert len(drawn) == 20 and tuple(windows(mix)) not in drawn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [HeadMix, Block])
def test_the_global_random_state_is_left_alone(make, training):
    layer = make(8, [RandomWindow(2, 5)]).train(training)
    before = torch.random.get_rng_state()
    layer(tokens(), GRID).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_mixes_with_random_windows_count():
    plain = HeadMix(8, [Dense(2)]).train()
    assert plain.next_draw() is None and "draws" not in plain.state_dict()
    assert mix_of().eval().next_draw() is None
    assert "draws" in mix_of().state_dict()


def test_a_draw_that_was_handed_in_is_used_and_not_counted():
    mix = mix_of().train()
    draw = mix.next_draw()
    with torch.no_grad():
        one, two = (mix(tokens(), GRID, draw=draw) for _ in range(2))
        assert torch.equal(one, two) and mix.draws.item() == 1
        assert not torch.allclose(mix(tokens(), GRID), one)


def test_a_window_over_everything_is_dense_attention():
    mix = mix_of(window=24).eval()
    dense = HeadMix(8, [Dense(2)]).eval()
    dense.load_state_dict({name: one for name, one in mix.state_dict().items() if name != "draws"})
    torch.testing.assert_close(mix(tokens(), GRID), dense(tokens(), GRID), rtol=1e-5, atol=1e-6)


def test_windows_hold_what_they_should():
    group = mix_of(window=5).groups[0]
    order = group.plan(HeadInputs(torch.zeros(1, 24, 8), None, None, None, GRID, None, torch.tensor(0))).layout.order
    held = [one for one in order.token.flatten().tolist() if one >= 0]
    assert sorted(held) == list(range(24))
    sizes = sorted(int((row >= 0).sum()) for row in order.token.reshape(-1, order.token.shape[-1]))
    assert sizes == [4, 5, 5, 5, 5]
