"""Counts of every layout against its mask."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.layouts import Blocks, Dense, Stencil, TokenMask, TokenSets
from attnkit.testing.strategies import grids, layout_cases, seeds


def full_mask(case):
    return case.layout.to_mask().expand(case.batch, case.heads, *case.sizes)


@given(case=layout_cases())
def test_visible_counts_the_mask(case):
    counts = case.layout.visible()
    assert counts.dtype == torch.int64
    assert counts.ndim == 3
    assert torch.equal(counts.expand(case.batch, case.heads, -1), full_mask(case).sum(-1))


@given(case=layout_cases())
def test_density_is_the_share_of_visible_pairs(case):
    assert 0.0 <= case.layout.density() <= 1.0
    assert abs(case.layout.density() - full_mask(case).double().mean().item()) < 1e-12


@given(case=layout_cases())
def test_what_calls_itself_full_hides_nothing(case):
    assert not case.layout.full or case.layout.to_mask().all()


@given(grid=grids())
def test_dense_and_one_window_over_everything_are_full(grid):
    kept = torch.ones(grid.tokens, dtype=torch.bool)
    row = torch.arange(grid.image_tokens)
    for layout in (Dense(grid.tokens), Blocks.windows(grid, 9), Blocks.permuted(row, 99, prefix=grid.prefix)):
        assert layout.full
        assert not layout.restrict(kept).full


@given(case=layout_cases(), head_dim=st.integers(1, 8), value_dim=st.none() | st.integers(1, 8))
def test_flops_count_the_visible_pairs(case, head_dim, value_dim):
    pairs = int(full_mask(case).sum())
    assert case.layout.pairs(case.batch, case.heads) == pairs
    width = head_dim + (head_dim if value_dim is None else value_dim)
    counted = case.layout.flops(head_dim, value_dim, batch=case.batch, heads=case.heads)
    assert counted == pairs * width
    dense = Dense(*case.sizes).flops(head_dim, value_dim, batch=case.batch, heads=case.heads)
    assert counted <= dense == case.batch * case.heads * case.sizes[0] * case.sizes[1] * width


@given(case=layout_cases())
def test_key_slots_bound_what_an_image_query_sees(case):
    seen = full_mask(case).sum(-1)[..., case.layout.global_queries :]
    assert not seen.numel() or int(seen.max()) <= case.layout.key_slots


@given(case=layout_cases())
def test_global_tokens_see_and_are_seen_by_all_that_is_not_masked(case):
    layout, mask = case.layout, full_mask(case)
    kept = torch.ones(1, 1, layout.num_keys, dtype=torch.bool) if layout.key_mask is None else layout.key_mask
    kept = kept[:, :, None].expand(case.batch, case.heads, layout.num_queries, -1)
    assert torch.equal(mask[:, :, : layout.global_queries], kept[:, :, : layout.global_queries])
    assert torch.equal(mask[..., : layout.global_keys], kept[..., : layout.global_keys])


@given(grid=grids(), seed=seeds())
def test_more_budget_never_means_fewer_pairs(grid, seed):
    index = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    sequences = [
        [Stencil(grid, kernel).pairs() for kernel in (1, 3, 5, 7, 19)],
        [Stencil(grid, kernel, border="clamp").pairs() for kernel in (1, 3, 5, 7, 19)],
        [Blocks.from_regions(grid, 2, index[..., :topk]).pairs() for topk in (1, 2, 3, 4)],
        [Blocks.permuted(torch.arange(grid.image_tokens), 2**power, prefix=grid.prefix).pairs() for power in range(8)],
        [TokenSets(index[..., :count], 4).pairs() for count in range(5)],
    ]
    for counts in sequences:
        assert counts == sorted(counts)
    for counts in sequences[:4]:
        assert counts[-1] == grid.tokens**2


@given(case=layout_cases())
def test_without_numbers_of_items_and_heads_the_layouts_own_are_counted(case):
    layout = case.layout
    items, heads = layout.visible().shape[:2]
    assert layout.pairs() == layout.pairs(items, heads) == int(layout.visible().sum())
    assert layout.pairs(heads=heads * 3 if heads == 1 else heads) == layout.pairs() * (3 if heads == 1 else 1)
    assert layout.flops(3) == layout.flops(3, 3, batch=items, heads=heads) == 6 * layout.pairs()


def test_no_pairs_at_all():
    assert Dense(0, 5).density() == Dense(5, 0).density() == 1.0
    assert Dense(0, 5).pairs(2, 3) == Dense(5, 0).flops(4) == 0
    nobody = Dense(3, 4).restrict(torch.zeros(4, dtype=torch.bool))
    assert nobody.density() == 0.0
    assert nobody.flops(8) == 0
    assert TokenMask(torch.zeros(0, 2, 3, 3, dtype=torch.bool)).pairs(0, 2) == 0
