"""What Vision Big Bird's three kinds of heads promise together: symmetries, sampling, and whom a token can hear of."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attnkit import Conv, Grid, PooledGlobal, RandomWindow, attend, use_backend
from attnkit.analysis import reach
from attnkit.layouts import Blocks
from attnkit.layouts.orders import permuted_order
from attnkit.primitives.permutation import random_permutation
from attnkit.primitives.pooling import cell_means
from attnkit.testing import dense_attention, random_qkv, random_tensor
from attnkit.testing.strategies import grids, seeds

BIRD = [Conv(2), RandomWindow(2, 9), PooledGlobal(2, 2)]


def permutations(tokens: int, count: int, seed: int = 0) -> torch.Tensor:
    """Many of random_window's permutations: (count, tokens)."""
    return torch.stack([random_permutation(tokens, (seed, draw), None) for draw in range(count)])


def windows(permutation: torch.Tensor, window: int) -> Blocks:
    """Random windows under given permutations (..., tokens)."""
    return Blocks(permuted_order(permutation, window, 0))


def moved(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Tokens of an image (1, H, W, C) in another order: place j gets token source[j]."""
    return x.flatten(1, 2)[:, source].view_as(x)


# Random windows alone.


@given(tokens=st.integers(1, 40), window=st.integers(1, 12), seed=seeds())
def test_relabelled_tokens_in_relabelled_windows_are_the_same_to_the_last_bit(tokens, window, seed):
    q, k, v = random_qkv((tokens, tokens), heads=2, seed=seed)
    permutation = random_permutation(tokens, (seed, 1), None)
    new = random_permutation(tokens, (seed, 2), None)
    # Token new[j] is called j now.
    relabelled = new.argsort()[permutation]
    for backend in ("gather", "reference"):
        with use_backend(backend):
            expected = attend(q, k, v, windows(permutation, window))
            found = attend(q[:, :, new], k[:, :, new], v[:, :, new], windows(relabelled, window))
        if backend == "gather":
            assert torch.equal(found, expected[:, :, new])
        # The reference adds up in the order of the tokens.
        torch.testing.assert_close(found, expected[:, :, new], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [12, 13])
def test_gradients_of_windows_that_divide_the_tokens_and_of_others(tokens):
    layout = windows(random_permutation(tokens, (5,), None), 4)
    q, k, v = random_qkv((tokens, tokens), seed=1, head_dim=2, grad=True)
    for backend in ("gather", "reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, backend=backend: attend(q, k, v, layout, backend=backend), (q, k, v)
        )


@pytest.mark.parametrize("tokens", [12, 13])
def test_weights_sum_to_one_and_the_last_window_s_empty_slots_get_none(tokens):
    layout = windows(random_permutation(tokens, (5,), None), 4)
    q, k, _ = random_qkv((tokens, tokens), seed=2, head_dim=3)
    weights = attend(q, k, torch.eye(tokens, dtype=torch.float64).expand(1, 1, -1, -1), layout, backend="gather")
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-12, atol=0)
    assert torch.equal(weights > 0, layout.to_mask())


def test_two_tokens_share_a_window_as_often_as_uniform_windows_say():
    """(M - 1) / (N - 1) in one layer, and over one token between them in two independent ones."""
    tokens, window, draws = 60, 6, 3000
    first, second = (permutations(tokens, draws, seed).argsort(-1) // window for seed in (1, 2))
    direct = first[:, :1] == first[:, 1:2]
    # Whom token 0 sees in the first layer, and whether one of them is in token 1's window of the second.
    near = first == first[:, :1]
    through = (near & (second == second[:, 1:2])).any(-1, keepdim=True)
    once = (window - 1) / (tokens - 1)
    twice = once + (1 - once) * (1 - math.comb(tokens - 1 - window, window - 1) / math.comb(tokens - 1, window - 1))
    for found, share in ((direct, once), (through, twice)):
        assert abs(found.double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / draws)


def test_uniform_weights_average_to_the_mean_of_all_tokens():
    """With zero queries, E[out_i] = v_i / M + (1 - 1 / M) * mean of the others, over permutations."""
    tokens, window, draws = 12, 4, 4000
    v = random_tensor(1, 1, tokens, 3, seed=0)
    rows = [one.expand(draws, -1, -1, -1) for one in (torch.zeros_like(v), torch.zeros_like(v), v)]
    found = attend(*rows, windows(permutations(tokens, draws)[:, None], window))[:, 0]
    own = v[0, 0]
    others = (own.sum(0) - own) / (tokens - 1)
    expected = own / window + (1 - 1 / window) * others
    deviation = (found.mean(0) - expected) / (found.std(0) / math.sqrt(draws))
    assert deviation.abs().max() < 4.5


def test_with_logits_the_average_is_near_dense_attention_and_nearer_in_larger_windows():
    """Weights are normalised inside each window, and the own token is always there: a bias that shrinks."""
    tokens, draws = 24, 1500
    q, k, v = random_qkv((tokens, tokens), seed=3)
    dense = dense_attention(q, k, v, torch.ones(tokens, tokens, dtype=torch.bool))[0]
    single, averaged, noise = [], [], []
    for window in (3, 6, 12, 24):
        rows = [one.expand(draws, -1, -1, -1) for one in (q, k, v)]
        found = attend(*rows, windows(permutations(tokens, draws)[:, None], window))
        single.append((found - dense).abs().mean().item())
        averaged.append((found.mean(0) - dense[0]).abs().mean().item())
        noise.append((found.std(0) / math.sqrt(draws)).mean().item())
    for errors in (single, averaged):
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12
    # Not the error of too few draws.
    assert averaged[0] > 10 * noise[0] and averaged[1] > 5 * noise[1]


# Pooled heads alone.


@given(grid=grids(max_height=6, max_width=7, max_prefix=0), pool=st.integers(1, 4), seed=seeds())
def test_pooling_and_projecting_commute(grid, pool, seed):
    """Means and affine maps do, at the edge too; a norm between them would not."""
    x, linear = random_tensor(1, grid.tokens, 4, seed=seed), nn.Linear(4, 6).double()
    lengths = tuple(min(pool, size) for size in grid.sizes)
    cells = tuple(-(-size // length) for size, length in zip(grid.sizes, lengths, strict=True))

    def pooled(tokens: torch.Tensor) -> torch.Tensor:
        return cell_means(tokens, grid, cells, lengths, None)[0]

    torch.testing.assert_close(linear(pooled(x)), pooled(linear(x)), rtol=1e-12, atol=1e-12)
    if max(lengths) > 1:
        assert not torch.allclose(F.layer_norm(pooled(x), (4,)), pooled(F.layer_norm(x, (4,))))


def inside_cells(grid: Grid, pool: int) -> torch.Tensor:
    """An order of the tokens that turns the tokens of every whole cell around."""
    number = torch.arange(grid.tokens).view(grid.sizes)
    cells = number.unfold(0, pool, pool).unfold(1, pool, pool)
    turned = cells.flip(2, 3)
    return turned.permute(0, 2, 1, 3).reshape(-1)


def whole_cells(grid: Grid, pool: int) -> torch.Tensor:
    """An order of the tokens that moves cells but keeps each as it is."""
    number = torch.arange(grid.tokens).view(grid.sizes)
    return number.roll((pool, 2 * pool), (0, 1)).reshape(-1)


def any_order(grid: Grid, pool: int) -> torch.Tensor:
    """An order of the tokens that tears cells apart."""
    return random_permutation(grid.tokens, (3,), None)


@pytest.mark.parametrize(
    ("order", "pool", "follows"),
    [(inside_cells, 2, True), (whole_cells, 2, True), (any_order, 2, False), (any_order, 1, True)],
)
def test_which_orders_of_the_tokens_pooled_heads_follow(random_mix, order, pool, follows):
    grid = Grid(4, 6)
    source = order(grid, pool)
    assert sorted(source.tolist()) == list(range(24)) != source.tolist()
    x = random_tensor(1, *grid.sizes, 4, seed=0)
    pooled = random_mix(PooledGlobal(2, pool))
    assert torch.allclose(pooled(moved(x, source)), moved(pooled(x), source), rtol=1e-10, atol=1e-10) is follows
    # A convolution tells neighbours from others, whatever the order.
    both = random_mix([Conv(1), PooledGlobal(1, pool)])
    assert not torch.allclose(both(moved(x, source)), moved(both(x), source))


def test_without_convolutions_only_the_windows_tell_where_a_token_is(random_mix):
    """Attention has no positions: in the last stage, where a cell is a token and a window is all, order is nothing."""
    x, source = random_tensor(1, 3, 4, 4, seed=0), random_permutation(12, (1,), None)
    blind = random_mix([RandomWindow(1, 12), PooledGlobal(1, 1)])
    torch.testing.assert_close(blind(moved(x, source)), moved(blind(x), source), rtol=1e-10, atol=1e-10)
    seeing = random_mix([Conv(1), RandomWindow(1, 12), PooledGlobal(1, 1)], dim=6)
    wide = random_tensor(1, 3, 4, 6, seed=0)
    assert not torch.allclose(seeing(moved(wide, source)), moved(seeing(wide), source))


# All three.


def test_swapping_two_tokens_changes_more_than_those_two(random_mix):
    bird = random_mix([Conv(2), PooledGlobal(2, 2)])
    x = random_tensor(1, 6, 6, 8, seed=0)
    source = torch.arange(36)
    # Of one cell, so that pooled heads only swap them.
    source[[14, 15]] = source[[15, 14]]
    change = (bird(moved(x, source)) - moved(bird(x), source)).abs().amax(-1).flatten()
    assert (change > 1e-6).sum() > 2
    # Far away nothing changes.
    assert change[35] < 1e-12


def test_a_thing_that_moves_by_whole_cells_away_from_the_border_moves_the_output(random_mix):
    """Convolution and pooled heads; at the border zero padding tells the thing where it is."""
    bird = random_mix([Conv(2), PooledGlobal(2, 2)])

    def image(row: int, column: int) -> torch.Tensor:
        blank = torch.zeros(1, 10, 10, 8, dtype=torch.float64)
        blank[:, row : row + 2, column : column + 2] = random_tensor(1, 2, 2, 8, seed=1)
        return blank

    here, there, edge, off = (bird(image(*place)) for place in ((2, 4), (4, 6), (0, 0), (3, 5)))

    def around(out: torch.Tensor, row: int, column: int) -> torch.Tensor:
        return out[:, row : row + 3, column : column + 3]

    torch.testing.assert_close(around(there, 4, 6), around(here, 2, 4), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(around(edge, 0, 0), around(here, 2, 4))
    # By one token, cells cut the thing otherwise.
    assert not torch.allclose(around(off, 3, 5), around(here, 2, 4))


def test_each_kind_of_head_sees_its_own_part_and_together_everything():
    grid = Grid(6, 6)
    assert reach(BIRD, grid).all()
    row, column = grid.coords().unbind(-1)
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    assert torch.equal(reach(BIRD[0], grid), near)
    assert reach(BIRD[2], grid).all()
    assert reach(BIRD[1], grid).sum(-1).eq(9).all()
    assert reach(BIRD[:2], grid).sum() < 36 * (9 + 9)
