"""topk_region and mask_predictor against routing written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attnkit import Dense, Grid, MaskPredictor, TopKRegion
from attnkit.errors import ShapeError
from attnkit.kernels import recording
from attnkit.primitives import HeadInputs
from attnkit.testing import random_tensor
from attnkit.testing.strategies import grids, seeds


def regions_of(grid, regions):
    """Places of every region, row-major; late regions may be small or empty."""
    lengths = [-(-size // regions) for size in grid.sizes]
    cut = [
        [range(number * length, min((number + 1) * length, size)) for number in range(regions)]
        for size, length in zip(grid.sizes, lengths, strict=True)
    ]
    return [list(itertools.product(rows, columns)) for rows, columns in itertools.product(*cut)]


def clear(scores, count):
    """The best `count` indices of a list of scores, if rounding cannot change them."""
    ranked = sorted(range(len(scores)), key=lambda at: -scores[at])
    if count < len(ranked):
        assume(scores[ranked[count - 1]] - scores[ranked[count]] > 1e-4)
    return ranked[:count]


@pytest.mark.parametrize("routing", ["shared", "per_head"])
@given(
    grid=grids(max_height=6, max_width=6, max_prefix=2), regions=st.integers(1, 4), topk=st.integers(1, 5), seed=seeds()
)
def test_topk_region(routing, random_mix, by_hand, agree, grid, regions, topk, seed):
    heads = 2
    mix = random_mix(TopKRegion(heads, regions, topk, routing=routing), seed=seed)
    hand = by_hand(mix, grid)
    places = regions_of(grid, regions)
    real = [number for number, held in enumerate(places) if held]
    region = {place: number for number, held in enumerate(places) for place in held}

    def routes(q, k):
        """For one item and the heads that choose together: the regions each real region sees."""
        queries, keys = (
            {number: one[:, [hand.token(*place) for place in places[number]]].mean(1).flatten() for number in real}
            for one in (q, k)
        )
        return {
            number: [
                real[at] for at in clear([float(queries[number] @ keys[other]) for other in real], min(topk, len(real)))
            ]
            for number in real
        }

    def expected(x):
        q, k, v = hand.projected(x)
        items = []
        for item in range(len(x)):
            outs = []
            for part in [slice(None)] if routing == "shared" else [slice(head, head + 1) for head in range(heads)]:
                chosen = routes(q[item, part].detach(), k[item, part].detach())
                lists = hand.lists(
                    lambda place, chosen=chosen: [key for number in chosen[region[place]] for key in places[number]]
                )
                one = slice(item, item + 1)
                outs.append(hand.attention(q[one, part], k[one, part], v[one, part], lists))
            items.append(torch.cat(outs, dim=1))
        return hand.joined(torch.cat(items))

    agree(mix, grid, expected, seed=seed)


def scores_by_hand(group, q, k, grid, extra=0):
    """Section 1 of the paper's sparse mode, for one head: (image tokens, image tokens) scores."""
    options, predictor = group.predicted, group.predictor
    first = grid.prefix - extra
    small_q = q[grid.prefix :] @ predictor.query.weight.T + predictor.query.bias
    small_k = k[first:] @ predictor.key.weight.T + predictor.key.bias
    logits = small_q @ (predictor.down.T @ small_k).T * options.heads**-0.5
    coefficients = logits.exp() / logits.exp().sum(-1, keepdim=True)
    basis = torch.where(predictor.up.abs() > options.threshold, predictor.up.abs(), 0.0)[extra:]
    rows = []
    for row in coefficients:
        kept = clear(row.tolist(), min(options.coefficients, len(row)))
        rows.append(sum(row[at] * basis[:, at] for at in kept))
    return torch.stack(rows)


@pytest.mark.parametrize("routing", ["shared", "per_head"])
def test_more_regions_than_there_are_mean_all(random_mix, routing):
    grid, x = Grid(5, 6, prefix=1), random_tensor(2, 31, 8, seed=0)
    options = TopKRegion(4, 3, 9, routing=routing)
    mixes = [random_mix(replace(options, topk=topk)) for topk in (9, 10, 1000)]
    dense = random_mix(Dense(4))
    dense.load_state_dict(mixes[0].state_dict())
    for mix in mixes:
        assert torch.equal(mix(x, grid), mixes[0](x, grid))
        torch.testing.assert_close(mix(x, grid), dense(x, grid), rtol=1e-10, atol=1e-10)
    with recording() as choices:
        mixes[2](x, grid)
    assert choices[0].call.layout.key_slots <= 9 * 4 + 1


@given(
    grid=grids(max_height=4, max_width=5, max_prefix=2),
    keep=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]),
    reduce_tokens=st.integers(1, 4),
    coefficients=st.integers(1, 6),
    with_rows=st.booleans(),
    seed=seeds(),
)
def test_mask_predictor(random_mix, by_hand, agree, grid, keep, reduce_tokens, coefficients, with_rows, seed):
    # A square number of tokens means a square image, so that other shapes of as many tokens are resized.
    assume(math.isqrt(grid.image_tokens) ** 2 != grid.image_tokens or grid.height == grid.width)
    extra = grid.prefix if with_rows else 0
    options = MaskPredictor(
        3, grid.image_tokens, keep, reduce_tokens=reduce_tokens, coefficients=coefficients, prefix=extra
    )
    mix = random_mix(options, head_dim=4, seed=seed)
    group, hand = mix.groups[0], by_hand(mix, grid)
    assert group.predictor.down.shape[1] == max((grid.image_tokens + extra) // reduce_tokens, 1)
    budget = math.ceil(Fraction(str(keep)) * grid.image_tokens)

    def expected(x):
        q, k, v = hand.projected(x)
        items = []
        for item in range(len(x)):
            outs = []
            for head in range(3):
                scores = scores_by_hand(group, q[item, head].detach(), k[item, head].detach(), grid, extra).detach()
                chosen = [clear(row.tolist(), budget) for row in scores]
                lists = hand.lists(
                    lambda place, chosen=chosen: [hand.places[at] for at in chosen[hand.places.index(place)]]
                )
                one = slice(item, item + 1), slice(head, head + 1)
                outs.append(hand.attention(q[one], k[one], v[one], lists))
            items.append(torch.cat(outs, dim=1))
        return hand.joined(torch.cat(items))

    agree(mix, grid, expected, seed=seed)


@given(
    grid=grids(max_height=5, max_width=6),
    keep=st.floats(0.01, 1.0),
    tokens=st.sampled_from([4, 6, 9, 20]),
    seed=seeds(),
)
def test_mask_predictor_keeps_its_budget_on_any_grid(random_mix, grid, keep, tokens, seed):
    mix = random_mix(MaskPredictor(2, tokens, keep), head_dim=4, seed=seed)
    with recording() as choices:
        mix(random_tensor(2, grid.tokens, 8, seed=seed), grid)
    seen = choices[0].call.layout.visible()
    assert seen.shape[:2] == (2, 2)
    budgets = seen[..., grid.prefix :] - grid.prefix
    assert budgets.unique().numel() == 1
    assert -1e-6 < float(budgets[0, 0, 0]) - keep * grid.image_tokens < 1


@pytest.mark.parametrize(
    "keep, tokens, budget",
    [(0.07, 100, 7), (0.29, 100, 29), (0.1, 3, 1), (0.25, 197, 50), (0.5, 7, 4), (1e-9, 5, 1), (1.0, 9, 9)],
)
def test_mask_predictor_rounds_its_budget_up_from_the_share_as_written(keep, tokens, budget):
    assert MaskPredictor(2, tokens, keep).budget(Grid(tokens)) == budget


def test_mask_predictor_gets_no_gradient_from_the_task(random_mix):
    grid = Grid(3, 3)
    mix = random_mix(MaskPredictor(2, 9, 0.3)).train()
    mix(random_tensor(1, 9, 4, seed=0), grid).sum().backward()
    without = {name for name, parameter in mix.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in mix.named_parameters() if "predictor" in name}


def test_mask_predictor_with_rows_for_other_prefix_tokens(random_mix):
    mix = random_mix(MaskPredictor(2, 4, 0.5, prefix=2))
    with pytest.raises(ShapeError, match=r"rows for 2 prefix tokens, but the grid has 1; give it prefix=1"):
        mix(random_tensor(1, 5, 4, seed=0), Grid(2, 2, prefix=1))


@pytest.mark.parametrize("options", [TopKRegion(2, 3, 4), MaskPredictor(2, 36, 0.3)])
def test_autocast_does_not_change_the_choice(random_mix, options):
    grid, group = Grid(6, 6), random_mix(options, head_dim=8).float().groups[0]

    def routed(q, k):
        return group.plan(HeadInputs(torch.zeros(2, 36, 16), q, k, k, grid)).layout.to_mask()

    rounded_differs = False
    for seed in range(20):
        q, k = (random_tensor(2, 2, 36, 8, seed=2 * seed + at, dtype=torch.float32) for at in range(2))
        outside = routed(q, k)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(routed(q, k), outside)
        rounded_differs |= not torch.equal(routed(q.bfloat16(), k.bfloat16()), outside)
    assert rounded_differs, "these numbers would not tell"


@pytest.mark.parametrize("options", [TopKRegion(2, 3, 2), MaskPredictor(2, 30, 0.2)])
def test_the_choice_itself_has_no_gradient(random_mix, options):
    """A tiny step that changes no route changes the output as the gradient says."""
    grid = Grid(5, 6)
    mix = random_mix(options)
    x = random_tensor(1, 30, 4, seed=1, grad=True)
    direction = random_tensor(1, 30, 4, seed=2)
    weights = random_tensor(1, 30, 4, seed=3)
    (gradient,) = torch.autograd.grad((mix(x, grid) * weights).sum(), x)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (float((mix(x + sign * step * direction, grid) * weights).sum()) for sign in (1, -1))
    assert abs((ahead - behind) / (2 * step) - float((gradient * direction).sum())) < 1e-6
