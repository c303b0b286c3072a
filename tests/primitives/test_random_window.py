"""random_window: which permutation when, that it is one, and that it is random enough."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Block, Dense, Grid, HeadMix, RandomWindow
from attnkit.kernels import recording
from attnkit.primitives import HeadInputs
from attnkit.primitives.permutation import random_permutation
from attnkit.testing import dense_attention, random_tensor
from attnkit.testing.strategies import grids, seeds


@given(tokens=st.integers(1, 60), seed=seeds(), draw=st.integers(0, 2**62))
def test_permutations_are_permutations(tokens, seed, draw):
    found = random_permutation(tokens, (seed, torch.tensor(draw)), None)
    assert sorted(found.tolist()) == list(range(tokens))
    assert torch.equal(found, random_permutation(tokens, (torch.tensor(seed), draw), None))


def test_every_word_counts():
    words = [(0, 0), (0, 1), (1, 0), (1,), (0,), (2**32, 0), (0, 2**32), (2**40 + 1, 0)]
    found = {tuple(random_permutation(40, one, None).tolist()) for one in words}
    assert len(found) == len(words)


def test_tokens_go_anywhere_equally_often():
    tokens, draws = 12, 1000
    places = torch.stack([random_permutation(tokens, (3, 1, 3, 4, draw), None) for draw in range(draws)])
    counts = torch.stack([(places == token).sum(0) for token in range(tokens)]).double()
    mean = draws / tokens
    # Rows and columns of a permutation matrix each sum to one, so this is chi-square with (N - 1)^2 degrees of freedom.
    statistic = float(((counts - mean) ** 2 / mean).sum()) * (tokens - 1) / tokens
    freedom = (tokens - 1) ** 2
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("what", ["draws", "seeds", "layers"])
def test_any_two_tokens_share_a_window_equally_often(what):
    tokens, window, draws = 12, 4, 600
    position = {"seeds": 0, "layers": 1, "draws": 4}[what]
    together = torch.zeros(tokens, tokens)
    for number in range(draws):
        words = [7, 2, 3, 4, 5]
        words[position] = number
        blocks = torch.empty(tokens, dtype=torch.int64)
        blocks[random_permutation(tokens, tuple(words), None)] = torch.arange(tokens) // window
        together += blocks[:, None] == blocks[None]
    share = (window - 1) / (tokens - 1)
    pairs = torch.stack([together[one, other] for one, other in itertools.combinations(range(tokens), 2)]).double()
    deviation = (pairs - draws * share) / math.sqrt(draws * share * (1 - share))
    assert abs(float(pairs.mean()) / draws - share) < 1e-9
    assert float(deviation.abs().max()) < 4.5
    assert 0.6 < float(deviation.square().mean()) < 1.5


@given(grid=grids(max_height=5, max_width=6), window=st.integers(1, 12), seed=seeds())
def test_attention_inside_the_windows_of_the_permutation(random_mix, by_hand, agree, grid, window, seed):
    mix = random_mix(RandomWindow(2, window, seed=seed % 5), seed=seed)
    hand = by_hand(mix, grid)
    q = torch.zeros(1, 2, grid.tokens, 2)
    row = mix.groups[0].permutation(HeadInputs(torch.zeros(1, grid.tokens, 4), q, q, q, grid)).tolist()
    number = {hand.places[token]: place // window for place, token in enumerate(row)}
    lists = hand.lists(lambda place: [key for key in hand.places if number[key] == number[place]])
    agree(mix, grid, lambda x: hand.joined(hand.attention(*hand.projected(x), lists)), seed=seed)


def windows_of(mix, grid, batch=1):
    """Which image tokens share a window in the next pass: bool (N, N)."""
    with recording() as choices:
        mix(random_tensor(batch, grid.tokens, mix.dim, seed=0, dtype=mix.proj.weight.dtype), grid)
    mask = choices[0].call.layout.to_mask()
    assert mask.shape[:2] == (1, 1)
    return mask[0, 0, grid.prefix :, grid.prefix :]


GRID = Grid(4, 5)


def fresh(seed=0, layer=0, **options):
    return HeadMix(4, [RandomWindow(2, 5, seed=seed, **options)], layer=layer)


def test_evaluation_is_a_function_of_seed_layer_and_size():
    mix = fresh().eval()
    first = windows_of(mix, GRID)
    for other in (mix, fresh().eval(), fresh().eval().double()):
        assert torch.equal(windows_of(other, GRID), first)
    for _ in range(3):
        mix.train()(torch.zeros(1, 20, 4), GRID)
    assert torch.equal(windows_of(mix.eval(), GRID), first)
    assert torch.equal(windows_of(mix, Grid(*GRID.sizes, prefix=2)), first)
    others = [
        windows_of(fresh(seed=1).eval(), GRID),
        windows_of(fresh(layer=1).eval(), GRID),
        windows_of(mix, Grid(5, 4)),
        windows_of(mix, Grid(2, 10)),
    ]
    assert not any(torch.equal(other, first) for other in others)


def test_training_draws_anew():
    mix = fresh().train()
    seen = [windows_of(mix, GRID) for _ in range(6)]
    assert len({tuple(one.flatten().tolist()) for one in seen}) == 6
    again = fresh().train()
    assert all(torch.equal(windows_of(again, GRID), one) for one in seen)
    assert not torch.equal(windows_of(fresh().eval(), GRID), seen[0])
    for other in (fresh(seed=1), fresh(layer=1)):
        assert not torch.equal(windows_of(other.train(), GRID), seen[0])


def test_training_without_resampling_uses_the_windows_of_evaluation():
    mix = fresh(resample=0).train()
    right = windows_of(fresh().eval(), GRID)
    assert all(torch.equal(windows_of(mix, GRID), right) for _ in range(3))


def test_all_items_of_a_batch_share_the_windows():
    mix = fresh().train()
    with recording() as choices:
        mix(torch.zeros(3, 20, 4), GRID)
    assert choices[0].call.layout.lead == (1, 1)


def test_a_reloaded_state_goes_on_with_the_same_draws():
    mix = fresh().train()
    for _ in range(4):
        windows_of(mix, GRID)
    state = {name: tensor.clone() for name, tensor in mix.state_dict().items()}
    assert state["draws"].item() == 4
    right = [windows_of(mix, GRID) for _ in range(3)]
    other = fresh().train()
    windows_of(other, GRID)
    other.load_state_dict(state)
    assert all(torch.equal(windows_of(other, GRID), one) for one in right)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("resample", [0, 1])
def test_groups_of_one_mix_differ_in_their_windows(training, resample):
    group = RandomWindow(2, 5, resample=resample)
    mix = HeadMix(8, [group, Dense(2), group, group]).train(training)
    with recording() as choices:
        mix(torch.zeros(1, 20, 8), GRID)
    masks = [choice.call.layout.to_mask() for choice in choices if choice.call.layout.kind == "blocks"]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 3


def test_blocks_of_a_stack_differ_by_their_layer_alone():
    def seen(layers):
        stack = torch.nn.Sequential(*(Block(4, [RandomWindow(2, 5)], layer=layer) for layer in layers)).eval()
        with recording() as choices:
            stack(torch.zeros(1, 4, 5, 4))
        return {tuple(choice.call.layout.to_mask().flatten().tolist()) for choice in choices}

    assert len(seen([0, 1, 2])) == 3
    assert len(seen([0, 0, 0])) == 1


def test_the_global_random_state_is_neither_read_nor_changed():
    mix = fresh().train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = windows_of(mix, GRID)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(windows_of(fresh().train(), GRID), first)


def test_averaged_over_draws_every_token_sees_every_other():
    """What windows leave out in one pass comes in another: their union over draws is dense attention's mask."""
    mix = fresh().train()
    union = windows_of(mix, GRID)
    for _ in range(60):
        union = union | windows_of(mix, GRID)
    assert union.all()


def test_values_are_those_of_masked_dense_attention(random_mix):
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 20, 4, seed=1)
    with recording() as choices:
        mix(x, GRID)
    call = choices[0].call
    same = (call.layout.order.slot // 5)[0, 0]
    out, _ = dense_attention(call.q, call.k, call.v, same[:, None] == same[None])
    mix.draws -= 1
    torch.testing.assert_close(mix(x, GRID), mix.proj(out.transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)
