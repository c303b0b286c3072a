"""Sight: what is drawn is what attention does."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import Grid
from attnkit.analysis.scene import scene_mix, scene_tokens
from attnkit.analysis.sight import Sight, row_weights
from attnkit.analysis.tracing import unmarked, visits
from attnkit.kernels.call import AttendCall
from attnkit.testing import KINDS, random_layout, random_qkv


def sight_of(options: attnkit.primitives.PrimitiveOptions, grid: Grid) -> Sight:
    mix = scene_mix([options], grid)
    with unmarked(mix):
        (visit,) = visits(mix, (scene_tokens(grid, mix.dim), grid))
    return Sight(visit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_row_weights_are_those_of_attention(kind, prefix):
    layout, (queries, keys) = random_layout(kind, Grid(4, 5, prefix=prefix), batch=1, heads=2, seed=3)
    q, k, _ = random_qkv((queries, keys), heads=2, head_dim=8, seed=1)
    every = torch.eye(keys, dtype=torch.float64).expand(1, 2, keys, keys)
    out = attnkit.attend(q, k, every, layout, backend="reference")
    call = AttendCall(q, k, every, layout, 8**-0.5)
    for query in range(queries):
        assert torch.allclose(row_weights(call, query), out[0, :, query])


def test_bias_and_gain_take_part():
    layout, (queries, keys) = random_layout("stencil", Grid(4, 5), batch=1, heads=2, seed=0)
    q, k, _ = random_qkv((queries, keys), heads=2, head_dim=8, seed=1)
    bias, gain = (torch.randn(1, 2, queries, keys, dtype=torch.float64) for _ in range(2))
    every = torch.eye(keys, dtype=torch.float64).expand(1, 2, keys, keys)
    out = attnkit.attend(q, k, every, layout, bias=bias, gain=gain, backend="reference")
    weights = row_weights(AttendCall(q, k, every, layout, 8**-0.5, bias, gain), 1)
    assert torch.allclose(weights, out[0, :, 1].abs())


def test_averaged_cells_are_found_and_share_their_weight():
    sight = sight_of(attnkit.PooledGlobal(heads=2, pool=3), Grid(5, 7, prefix=1))
    cells = sight.cells()
    assert cells is not None
    rows = cells[1:].view(5, 7)
    assert len(set(rows.flatten().tolist())) == 2 * 3
    assert all(len(set(block.flatten().tolist())) == 1 for block in (rows[:3, :3], rows[3:, :3], rows[:3, 6:]))
    weights = sight.weights(9)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(weights[1:].view(5, 7)[:3, :3], weights[1].expand(3, 3), atol=1e-6)


def test_mixtures_reach_every_token():
    sight = sight_of(attnkit.Linformer(heads=2, tokens=16, rank=4), Grid(4, 4))
    assert sight.cells() is None and sight.seen(3).tolist() == [1.0] * 16


def test_padding_stands_for_no_token():
    sight = sight_of(attnkit.PaddedTopKRegion(heads=2, regions=2, topk=9), Grid(5, 5))
    assert sight.keys_are() == "tokens" and sight.key_counts(7) == [(25.0, 11.0)]
    assert sight.seen(7).tolist() == [1.0] * 25 and sight.weights(7).sum().item() < 1.0


def test_what_a_factor_depends_on_is_not_seen():
    """The weight of a region comes from all tokens of the query's region too."""
    sight = sight_of(attnkit.SoftTopKRegion(heads=2, regions=4, topk=2), Grid(8, 8))
    assert sight.keys_are() == "tokens" and sight.seen(20).sum() == 8
    assert all(sources is not None and ((sources > 0).sum(1) == 1).all() for sources in sight.sources)


def test_a_convolution_shows_its_kernel():
    seen = sight_of(attnkit.Conv(heads=2, kernel=3), Grid(5, 6)).seen(2 * 6 + 3).view(5, 6)
    expected = torch.zeros(5, 6)
    expected[1:4, 2:5] = 1
    assert torch.equal(seen, expected)


def test_heads_that_differ_count_as_shares():
    seen = sight_of(attnkit.CrossShaped(heads=2, stripe=1), Grid(4, 5)).seen(1 * 5 + 2).view(4, 5)
    assert seen[1].tolist() == [0.5, 0.5, 1.0, 0.5, 0.5] and seen[:, 2].tolist() == [0.5, 1.0, 0.5, 0.5]
    assert seen.sum() == 0.5 * 7 + 1


def test_strided_queries_are_found_by_place():
    sight = sight_of(attnkit.LearnedQuery(heads=2, kernel=3, stride=2), Grid(5, 6))
    assert sight.query_grid.sizes == (3, 3)
    assert sight.nearest_query((4, 5)) == (2 * 3 + 2, (4, 4))
    assert sight.nearest_query((0, 0)) == (0, (0, 0))


def test_routing_finds_the_other_thing():
    # Both things of the made-up picture, and nothing but things.
    seen = sight_of(attnkit.TopKRegion(heads=2, regions=7, topk=4), Grid(14, 14)).seen(4 * 14 + 3).view(14, 14)
    assert seen[8, 10] == 1 and seen[0].sum() == 0 and seen[13].sum() == 0


def test_queries_that_see_nothing_weigh_nothing():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    q, k, v = random_qkv((3, 3))
    assert row_weights(AttendCall(q, k, v, attnkit.layouts.TokenMask(mask), 1.0), 0).tolist() == [[0.0] * 3]


def test_tokens_that_are_dropped_are_not_looked_at():
    model = attnkit.build("vit_micro", keep_tokens=[1.0, 0.5, 0.5, 0.25], num_classes=5).eval()
    with unmarked(model):
        sight = Sight(visits(model, (torch.randn(1, 3, 32, 32),))[-1])
    left = sight.inputs.places
    assert left is not None and left.shape == (1, 33)
    query, spot = sight.nearest_query((3, 4))
    assert int(left[0, query]) == 1 + spot[0] * 8 + spot[1]
    weights = sight.weights(query)
    assert weights.shape == (65,) and weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    gone = torch.ones(65, dtype=torch.bool).scatter(0, left[0], False)
    assert (weights[gone] == 0).all() and (sight.seen(query)[left[0]] == 1).all()
