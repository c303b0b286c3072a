"""With the full budget every softmax primitive is dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from attnkit import (
    CrossShaped,
    Dense,
    Grid,
    LearnedQuery,
    Linformer,
    MaskPredictor,
    Neighborhood,
    PooledGlobal,
    RandomWindow,
    TopKRegion,
    Window,
)
from attnkit.kernels import recording
from attnkit.testing import outputs_and_gradients, random_tensor
from attnkit.testing.strategies import grids, seeds

FULL = {
    "all regions": lambda grid: TopKRegion(2, 3, 9),
    "more regions than there are": lambda grid: TopKRegion(2, 2, 50, routing="per_head"),
    "one region": lambda grid: TopKRegion(2, 1, 1),
    "all keys kept": lambda grid: MaskPredictor(2, grid.image_tokens, 1.0),
    "all keys kept, made for another grid": lambda grid: MaskPredictor(2, 10, 1.0),
    "one random window": lambda grid: RandomWindow(2, grid.image_tokens),
    "a random window larger than the image": lambda grid: RandomWindow(2, grid.image_tokens + 5, seed=3),
    "one window": lambda grid: Window(2, grid.sizes),
    "a window larger than the image": lambda grid: Window(2, 20),
    "one shifted window": lambda grid: Window(2, grid.sizes, partition="shifted"),
    "one dilated window": lambda grid: Window(2, 11, partition="grid"),
    "a neighborhood of everything": lambda grid: Neighborhood(2, 2 * max(grid.sizes) + 1),
    "one stripe": lambda grid: CrossShaped(2, max(grid.sizes)),
}


def like(mix, other):
    """Gives a mix the weights that it shares with another."""
    mix.load_state_dict({**mix.state_dict(), **other.state_dict()})
    return mix


def compare(mix, dense, grid, seed):
    x = random_tensor(2, grid.tokens, 4, seed=seed, grad=True)
    shared = [[one.qkv.weight, one.qkv.bias, one.proj.weight, one.proj.bias] for one in (mix, dense)]
    found, right = (
        outputs_and_gradients(lambda x, *_, one=one: one(x, grid), [x, *weights], seed=seed)
        for one, weights in zip((mix, dense), shared, strict=True)
    )
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", FULL)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_full_budget_is_dense(budget, random_mix, grid, seed):
    dense = random_mix(Dense(2), seed=seed)
    mix = like(random_mix(FULL[budget](grid), seed=seed + 1), dense)
    with recording() as choices:
        mix(torch.zeros(1, grid.tokens, 4, dtype=torch.float64), grid)
    for choice in choices:
        assert choice.call.layout.to_mask().all()
        assert choice.call.layout.density() == 1.0
    compare(mix, dense, grid, seed)


@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_pooling_single_tokens_is_dense(random_mix, grid, seed):
    dense = random_mix(Dense(2), seed=seed)
    mix = random_mix(PooledGlobal(2, 1), seed=seed)
    with torch.no_grad():
        for name in ("weight", "bias"):
            columns = getattr(dense.qkv, name)
            getattr(mix.qkv, name).copy_(columns[:4])
            getattr(mix.groups[0].kv, name).copy_(columns[4:])
            getattr(mix.proj, name).copy_(getattr(dense.proj, name))
    x = random_tensor(2, grid.tokens, 4, seed=seed, grad=True)
    found, right = (outputs_and_gradients(lambda x, one=one: one(x, grid), [x]) for one in (mix, dense))
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_linformer_with_every_token_its_own_combination_is_dense(random_mix, grid, seed):
    # A sequence, so that no number of tokens is taken for a square image.
    grid = Grid(grid.image_tokens, prefix=grid.prefix)
    dense = random_mix(Dense(2), seed=seed)
    mix = like(random_mix(Linformer(2, grid.image_tokens, grid.image_tokens), seed=seed), dense)
    with torch.no_grad():
        mix.groups[0].key_mix.copy_(torch.eye(grid.image_tokens))
        mix.groups[0].value_mix.copy_(torch.eye(grid.image_tokens))
    compare(mix, dense, grid, seed)


@given(grid=grids(max_height=4, max_width=5), seed=seeds())
def test_learned_queries_over_everything_see_one_global_summary(random_mix, grid, seed):
    """A window that covers the image from everywhere gives every place the same output."""
    options = LearnedQuery(2, 2 * max(grid.sizes) + 1, relative_bias=False, gain="none")
    mix = random_mix(options, seed=seed)
    x = random_tensor(2, grid.tokens, 4, seed=seed)
    v = torch.stack((x @ mix.qkv.weight.T + mix.qkv.bias).chunk(2, dim=-1), dim=1)
    scores = (x @ mix.groups[0].score_weight().T).transpose(1, 2).unflatten(1, (2, 2))
    out = torch.einsum("bqmn,bmnd->bmd", scores.softmax(-1), v).flatten(1)
    expected = mix.proj(out)[:, None].expand(-1, grid.tokens, -1)
    torch.testing.assert_close(mix(x, grid), expected, rtol=1e-10, atol=1e-10)
