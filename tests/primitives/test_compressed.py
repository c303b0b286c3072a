"""pooled_global and linformer: fewer keys than tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid, Linformer, PooledGlobal
from attnkit.kernels import recording
from attnkit.primitives.pooling import cell_means
from attnkit.primitives.resizing import rows_for_grid
from attnkit.testing import random_tensor
from attnkit.testing.strategies import grids, seeds


@given(grid=grids(max_height=6, max_width=7), pool=st.integers(1, 8), heads=st.integers(1, 2), seed=seeds())
def test_pooled_global(random_mix, by_hand, agree, grid, pool, heads, seed):
    mix = random_mix(PooledGlobal(heads, pool), seed=seed)
    hand, group = by_hand(mix, grid), mix.groups[0]
    assert mix.qkv.out_features == 2 * heads

    def expected(x):
        image = x[:, grid.prefix :].transpose(1, 2).unflatten(2, grid.sizes)
        sides = tuple(min(pool, size) for size in grid.sizes)
        means = F.avg_pool2d(image, sides, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
        tokens = torch.cat([x[:, : grid.prefix], means], dim=1)
        k, v = (
            tokens @ weight.T + bias
            for weight, bias in zip(group.kv.weight.chunk(2), group.kv.bias.chunk(2), strict=True)
        )
        q = F.linear(x, mix.qkv.weight, mix.qkv.bias)
        q, k, v = (torch.stack(one.chunk(heads, dim=-1), dim=1) for one in (q, k, v))
        lists = [list(range(tokens.shape[1]))] * grid.tokens
        return hand.joined(hand.attention(q, k, v, lists))

    agree(mix, grid, expected, seed=seed)


@given(grid=grids(max_height=6, max_width=7), pool=st.integers(1, 8), seed=seeds())
def test_masked_tokens_take_no_part_in_the_means(random_mix, grid, pool, seed):
    mix = random_mix(PooledGlobal(2, pool), seed=seed)
    x = random_tensor(2, grid.tokens, 4, seed=seed)
    kept = torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    with recording() as choices:
        mix(x, grid, token_mask=kept)
    call, hand = choices[0].call, mix.groups[0].kv
    sides = [min(pool, size) for size in grid.sizes]
    cells = [
        [down * grid.width + right for down in rows for right in columns]
        for rows in (range(start, min(start + sides[0], grid.height)) for start in range(0, grid.height, sides[0]))
        for columns in (range(start, min(start + sides[1], grid.width)) for start in range(0, grid.width, sides[1]))
    ]
    for item in range(2):
        for number, cell in enumerate(cells):
            alive = [grid.prefix + at for at in cell if kept[item, grid.prefix + at]]
            seen = call.layout.to_mask()[item, 0, 0, grid.prefix + number]
            assert bool(seen) == bool(alive)
            if alive:
                right = hand(x[item, alive].mean(0))[:4]
                found = call.k[item, :, grid.prefix + number].flatten()
                torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@given(grid=grids(max_height=4, max_width=5), rank=st.integers(1, 6), heads=st.integers(1, 2), seed=seeds())
def test_linformer(random_mix, by_hand, agree, grid, rank, heads, seed):
    # Image tokens as a square only where they are one: what else has a square number would be resized.
    grid = grid if grid.height == grid.width or grid.image_tokens not in (4, 9, 16) else Grid(2, 3, prefix=grid.prefix)
    mix = random_mix(Linformer(heads, grid.image_tokens, rank), seed=seed)
    hand, group = by_hand(mix, grid), mix.groups[0]

    def expected(x):
        q, k, v = hand.projected(x)
        keys, values = (
            torch.cat(
                [one[:, :, : grid.prefix], torch.einsum("nr,bhnd->bhrd", weight, one[:, :, grid.prefix :])], dim=2
            )
            for one, weight in ((k, group.key_mix), (v, group.value_mix))
        )
        lists = [list(range(grid.prefix + rank))] * grid.tokens
        return hand.joined(hand.attention(q, keys, values, lists))

    agree(mix, grid, expected, seed=seed)


def test_rows_keep_their_meaning_on_other_grids():
    """Rows that are a linear function of the place stay that function, and sums over tokens keep their size."""
    rows = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    longer = rows_for_grid(rows, 12, Grid(24), summed=False)
    inner = longer[1:-1, 0]
    torch.testing.assert_close(
        inner.diff(), torch.full((21,), float(inner[1] - inner[0]), dtype=torch.float64), atol=1e-6, rtol=0
    )
    constant = torch.full((16, 3), 0.5)
    for grid in (Grid(4, 4), Grid(7, 3), Grid(2, 9, prefix=2)):
        assert torch.allclose(rows_for_grid(constant, 16, grid, summed=False), torch.tensor(0.5))
        assert torch.allclose(rows_for_grid(constant, 16, grid, summed=True).sum(0), torch.tensor(8.0))


def test_rows_of_a_square_image_turn_with_it():
    rows = random_tensor(9, 2, seed=0, dtype=torch.float32)
    wide = rows_for_grid(rows, 9, Grid(3, 5), summed=False).view(3, 5, 2)
    turned = rows_for_grid(rows.view(3, 3, 2).transpose(0, 1).reshape(9, 2), 9, Grid(5, 3), summed=False).view(5, 3, 2)
    torch.testing.assert_close(wide, turned.transpose(0, 1))


@pytest.mark.parametrize("sizes", [(11,), (3, 2, 2)])
def test_they_take_any_number_of_axes(random_mix, sizes):
    grid = Grid(*sizes, prefix=1)
    x = random_tensor(2, grid.tokens, 4, seed=0)
    for options in (PooledGlobal(2, 2), Linformer(2, 9, 3)):
        assert random_mix(options)(x, grid).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_large_cells_in_half_precision(dtype, masked):
    """4096 numbers of 100 do not fit into float16, and bfloat16 cannot count beyond 256."""
    grid = Grid(64, 64, prefix=1)
    x = (100 + random_tensor(1, grid.tokens, 3, seed=0)).to(dtype)
    mask = torch.rand(1, grid.tokens, generator=torch.Generator().manual_seed(0)) < 0.9 if masked else None
    for cells, lengths in (((1, 1), (64, 64)), ((2, 3), (32, 22))):
        means, counts = cell_means(x, grid, cells, lengths, mask)
        exact, number = cell_means(x.double(), grid, cells, lengths, mask)
        assert means.dtype == dtype
        assert torch.equal(counts.double(), number)
        torch.testing.assert_close(means.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_pooled_global_over_a_large_image_in_half_precision(random_mix):
    mix = random_mix(PooledGlobal(2, 64))
    x = 100 + random_tensor(1, 64, 64, 4, seed=0)
    found = mix.half()(x.half())
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), mix.double()(x), rtol=2e-2, atol=2e-1)
