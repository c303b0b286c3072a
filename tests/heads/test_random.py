"""Random windows: a function of numbers in evaluation, counted draws in training, no use of PyTorch's random state."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Block, Dense, Grid, HeadMix, RandomWindow
from attnkit.primitives import HeadInputs
from attnkit.primitives.permutation import random_permutation
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


@given(count=st.integers(1, 200), words=st.lists(st.integers(0, 2**40), max_size=4), draw=st.integers(0, 2**40))
def test_permutations_are_permutations(count, words, draw):
    number = torch.tensor(draw)
    found = random_permutation(count, (*words, number), "cpu")
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(count))
    # A number and a tensor that holds it are the same word.
    assert torch.equal(found, random_permutation(count, (*words, draw), "cpu"))


def test_every_word_matters_and_so_does_its_place():
    words = [(0, 1, 4, 6, 0), (1, 0, 4, 6, 0), (0, 1, 6, 4, 0), (0, 1, 4, 6, 1), (0, 1, 4, 6), (2**33, 1, 4, 6, 0)]
    found = {tuple(random_permutation(24, one, None).tolist()) for one in words}
    assert len(found) == len(words)


def test_evaluation_is_fixed_whatever_came_before():
    mix = mix_of().eval()
    first = mix(tokens(), GRID)
    mix(tokens(5, seed=1), GRID)
    mix(tokens(1, seed=2, grid=Grid(3, 3)), Grid(3, 3))
    mix.train()(tokens(), GRID)
    mix.eval()
    assert torch.equal(mix(tokens(), GRID), first)
    torch.manual_seed(99)
    assert torch.equal(mix(tokens(), GRID), first)


def test_evaluation_does_not_depend_on_the_batch():
    mix, x = mix_of().eval(), tokens(5)
    torch.testing.assert_close(mix(x[2:3], GRID), mix(x, GRID)[2:3])
    assert windows(mix, batch=1) == windows(mix, batch=7)


def test_evaluation_depends_on_seed_layer_height_and_width():
    kinds = [windows(mix_of(seed=seed, layer=layer)) for seed in range(3) for layer in range(3)]
    kinds += [windows(mix_of(), Grid(*sizes)) for sizes in ((6, 4), (3, 8), (24,), (2, 3, 4))]
    assert len(set(map(tuple, kinds))) == len(kinds)
    assert windows(mix_of(seed=2, layer=1)) == windows(mix_of(seed=2, layer=1))
    # Prefix tokens belong to no window.
    assert windows(mix_of(), Grid(4, 6, prefix=3)) == windows(mix_of())


def test_training_draws_anew_and_counts():
    mix = mix_of().train()
    with torch.no_grad():
        outputs = [mix(tokens(), GRID) for _ in range(4)]
    assert mix.draws.item() == 4
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(outputs))
    drawn = {tuple(windows(mix, draw=torch.tensor(draw))) for draw in range(20)}
    assert len(drawn) == 20 and tuple(windows(mix)) not in drawn


def test_without_resampling_training_sees_evaluations_windows():
    mix = mix_of(resample=0)
    with torch.no_grad():
        assert torch.equal(mix.train()(tokens(), GRID), mix.eval()(tokens(), GRID))
    assert windows(mix, draw=torch.tensor(3)) == windows(mix)


def test_a_reloaded_mix_goes_on_with_the_same_draws():
    mix = mix_of().train()
    with torch.no_grad():
        for _ in range(3):
            mix(tokens(), GRID)
        other = mix_of().train()
        assert not torch.allclose(copy.deepcopy(other)(tokens(), GRID), copy.deepcopy(mix)(tokens(), GRID))
        other.load_state_dict(copy.deepcopy(mix.state_dict()))
        for step in range(3):
            assert torch.equal(other(tokens(seed=step), GRID), mix(tokens(seed=step), GRID))
    assert other.draws.item() == mix.draws.item() == 6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [HeadMix, Block])
def test_the_global_random_state_is_left_alone(make, training):
    layer = make(8, [RandomWindow(2, 5)]).train(training)
    before = torch.random.get_rng_state()
    layer(tokens(), GRID).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_does_not_depend_on_the_global_random_state():
    found = []
    mix = mix_of().train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(copy.deepcopy(mix)(tokens(), GRID))
    assert torch.equal(*found)


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
    order = group.order(HeadInputs(torch.zeros(1, 24, 8), None, None, None, GRID, None, torch.tensor(0)))
    held = [one for one in order.token.flatten().tolist() if one >= 0]
    assert sorted(held) == list(range(24))
    sizes = sorted(int((row >= 0).sum()) for row in order.token.reshape(-1, order.token.shape[-1]))
    assert sizes == [4, 5, 5, 5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_any_two_tokens_meet_as_often_as_chance_says(seed):
    """Two of N tokens share one of N / M windows of M with probability (M - 1) / (N - 1); 5 sigma, over all pairs."""
    count, window, draws = 12, 4, 400
    rows = torch.stack([random_permutation(count, (seed, 0, count, draw), None) for draw in range(draws)])
    place = torch.empty_like(rows).scatter_(1, rows, torch.arange(count).expand_as(rows) // window)
    chance = (window - 1) / (count - 1)
    sigma = math.sqrt(chance * (1 - chance) / draws)
    met = (place[:, :, None] == place[:, None, :]).double().mean(0)
    off = (met - chance).abs()[~torch.eye(count, dtype=torch.bool)]
    assert float(off.max()) < 5 * sigma
    # Were the draws alike, pairs would meet always or never.
    assert float(met[~torch.eye(count, dtype=torch.bool)].std()) < 2 * sigma
