"""The variants of mask_predictor against loops over tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attnkit import (
    CompetingMaskPredictor,
    Conv,
    Dense,
    Grid,
    HeadMix,
    MaskPredictor,
    MaskReconstruction,
    ThresholdMaskPredictor,
    Window,
)
from attnkit.errors import ConfigError, ShapeError
from attnkit.kernels import recording
from attnkit.primitives import HeadInputs
from attnkit.testing import random_tensor, randomize_parameters
from attnkit.testing.strategies import grids, seeds

GRIDS = grids(max_height=4, max_width=5, max_prefix=2)


def sequence(grid):
    """A square number of tokens means a square image, so that other shapes of as many tokens are resized."""
    return math.isqrt(grid.image_tokens) ** 2 == grid.image_tokens and grid.height != grid.width


def coefficients(group, q, k, kept, prefix):
    """Shares of basis rows of each image query of one head: rows are lists."""
    options, predictor = group.predicted, group.predictor
    first = prefix - options.prefix
    small_q = q[prefix:] @ predictor.query.weight.T + predictor.query.bias
    small_k = k[first:] @ predictor.key.weight.T + predictor.key.bias
    small_q, small_k = (
        torch.stack([row if there else torch.zeros_like(row) for row, there in zip(rows, mask, strict=True)])
        for rows, mask in ((small_q, kept[prefix:]), (small_k, kept[first:]))
    )
    logits = small_q @ (predictor.down.T @ small_k).T / options.heads**0.5
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def scores(group, q, k, kept, prefix):
    """Scores of each image query of one head for the tokens that have rows."""
    options, predictor = group.predicted, group.predictor
    rows = []
    for row in coefficients(group, q, k, kept, prefix).detach().tolist():
        if options.least_share is not None:
            assume(all(abs(one - options.least_share) > 1e-4 for one in row))
            counting = [at for at, one in enumerate(row) if one > options.least_share]
        else:
            ranked = sorted(range(len(row)), key=lambda at, row=row: -row[at])
            counting = ranked[: options.coefficients]
            if len(ranked) > len(counting):
                assume(row[counting[-1]] - row[ranked[len(counting)]] > 1e-4)
        basis = predictor.up.detach().abs()
        rows.append(
            [
                sum(row[at] * float(basis[token, at]) for at in counting if float(basis[token, at]) > options.threshold)
                for token in range(len(basis))
            ]
        )
    return rows


def best(row, count):
    ranked = sorted(range(len(row)), key=lambda at: -row[at])
    if 0 < count < len(ranked):
        assume(row[ranked[count - 1]] - row[ranked[count]] > 1e-4)
    return set(ranked[:count])


def above(row, limit):
    assume(all(abs(one - limit) > 1e-4 for one in row))
    return {at for at, one in enumerate(row) if one > limit}


VARIANTS = st.fixed_dictionaries(
    {
        "least_share": st.sampled_from([None, 0.0, 0.2]),
        "tied": st.booleans(),
        "reduce_tokens": st.integers(1, 3),
        "coefficients": st.integers(1, 4),
        "threshold": st.sampled_from([0.02, 0.3]),
    }
)


@given(
    grid=GRIDS,
    limit=st.sampled_from([None, 0.1, 0.5]),
    keep=st.sampled_from([0.1, 0.4, 1.0]),
    more=VARIANTS,
    rows=st.booleans(),
    seed=seeds(),
)
def test_variants(random_mix, by_hand, agree, grid, limit, keep, more, rows, seed):
    assume(not sequence(grid))
    extra = grid.prefix if rows else 0
    options = MaskPredictor(2, grid.image_tokens, keep, prefix=extra, **more)
    if limit is not None:
        options = ThresholdMaskPredictor(2, grid.image_tokens, score=limit, prefix=extra, **more)
    mix = random_mix(options, head_dim=4, seed=seed)
    group, hand, kept = mix.groups[0], by_hand(mix, grid), [True] * grid.tokens
    assert (group.predictor.up is group.predictor.down) == more["tied"]

    def expected(x):
        q, k, v = hand.projected(x)
        items = []
        for item in range(len(x)):
            outs = []
            for head in range(2):
                found = scores(group, q[item, head].detach(), k[item, head].detach(), kept, grid.prefix)
                found = [row[extra:] for row in found]
                budget = math.ceil(keep * grid.image_tokens - 1e-9)
                seen = [best(row, budget) if limit is None else above(row, limit) for row in found]
                lists = hand.lists(
                    lambda place, seen=seen: [hand.places[at] for at in sorted(seen[hand.places.index(place)])]
                )
                one = slice(item, item + 1), slice(head, head + 1)
                outs.append(visible(hand, q[one], k[one], v[one], lists))
            items.append(torch.cat(outs, dim=1))
        return hand.joined(torch.cat(items))

    agree(mix, grid, expected, seed=seed)


def visible(hand, q, k, v, lists):
    """As `attention` by hand, and 0 where the list is empty."""
    safe = [keys or [0] for keys in lists]
    there = torch.tensor([bool(keys) for keys in lists], dtype=q.dtype)
    return hand.attention(q, k, v, safe) * there[:, None]


@given(
    grid=GRIDS,
    limit=st.sampled_from([None, 0.3]),
    keep=st.sampled_from([0.1, 0.4, 0.8, 1.0]),
    more=VARIANTS,
    rows=st.booleans(),
    blind=st.booleans(),
    masked=st.booleans(),
    seed=seeds(),
)
def test_prefix_tokens_compete_and_masked_tokens_leak(
    random_mix, by_hand, grid, limit, keep, more, rows, blind, masked, seed
):
    assume(not sequence(grid))
    prefix, extra = grid.prefix, grid.prefix if rows else 0
    options = CompetingMaskPredictor(2, grid.image_tokens, keep, score=limit, blind=blind, prefix=extra, **more)
    mix = random_mix(options, head_dim=4, seed=seed)
    group, hand = mix.groups[0], by_hand(mix, grid)
    x = random_tensor(2, grid.tokens, 8, seed=seed)
    mask = (
        (random_tensor(2, grid.tokens, seed=seed + 1) < 0.4) if masked else torch.ones(2, grid.tokens, dtype=torch.bool)
    )
    mask[:, :prefix] = True
    q, k, v = hand.projected(x)
    k, v = (one * mask[:, None, :, None] for one in (k, v))
    items = []
    for item in range(2):
        kept, left = mask[item].tolist(), int(mask[item, prefix:].sum())
        outs = []
        for head in range(2):
            lists = [list(range(grid.tokens))] * prefix
            found = scores(group, q[item, head].detach(), k_of(mix, x, hand)[item, head].detach(), kept, prefix)
            for at, row in enumerate(found):
                tokens = [token for token in range(prefix - extra, grid.tokens) if kept[token]]
                there = [row[token - prefix + extra] for token in tokens]
                budget = math.ceil(keep * (grid.image_tokens + extra))
                if left < grid.image_tokens:
                    budget = min(budget, left)
                chosen = best(there, budget) if limit is None else above(there, limit)
                keys = [*range(prefix - extra), *(tokens[one] for one in sorted(chosen))]
                lists.append([] if blind and not kept[prefix + at] else keys)
            one = slice(item, item + 1), slice(head, head + 1)
            outs.append(visible(hand, q[one], k[one], v[one], lists))
        items.append(torch.cat(outs, dim=1))
    right = hand.joined(torch.cat(items))
    out = mix(x, grid, token_mask=mask if masked else None)
    rows_that_count = mask | torch.tensor(blind)
    torch.testing.assert_close(out[rows_that_count], right[rows_that_count], rtol=1e-9, atol=1e-9)


def k_of(mix, x, hand):
    """Keys before anything is masked."""
    return hand.projected(x)[1]


def test_masked_tokens_take_softmax_weight_of_the_prefix_alone(random_mix):
    """Values that are all 1 come out as the share of keys that are left where all logits are 0."""
    mix = random_mix(CompetingMaskPredictor(1, 8, 1.0, prefix=1))
    with torch.no_grad():
        mix.qkv.weight.zero_()
        mix.qkv.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
        mix.proj.weight.copy_(torch.eye(2))
        mix.proj.bias.zero_()
    mask = torch.tensor([[True] * 4 + [False] * 5])
    out = mix(random_tensor(1, 9, 2, seed=0), Grid(8, prefix=1), token_mask=mask)
    torch.testing.assert_close(out[0, 0], torch.full((2,), 4 / 9, dtype=out.dtype))
    torch.testing.assert_close(out[0, 1:4], torch.ones(3, 2, dtype=out.dtype))
    right = random_mix(MaskPredictor(1, 8, 1.0, prefix=1))
    right.load_state_dict(mix.state_dict())
    out = right(random_tensor(1, 9, 2, seed=0), Grid(8, prefix=1), token_mask=mask)
    torch.testing.assert_close(out[0, :4], torch.ones(4, 2, dtype=out.dtype))


def test_the_budget_does_not_shrink(random_mix):
    """Fewer tokens once are not fewer tokens ever after."""
    mix = random_mix(CompetingMaskPredictor(2, 32, 0.5, prefix=1), head_dim=4)
    grid, x = Grid(32, prefix=1), random_tensor(2, 33, 8, seed=0)
    before = mix(x, grid)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[:, 11:] = False
    with recording() as choices:
        mix(x, grid, token_mask=mask)
    assert choices[0].call.layout.visible()[..., 1:].unique().tolist() == [10]
    assert torch.equal(mix(x, grid), before)


def test_each_item_has_a_budget_of_its_own(random_mix):
    """The authors' code takes the first item's for all."""
    mix = random_mix(CompetingMaskPredictor(2, 32, 0.5, prefix=1), head_dim=4)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[0, 6:], mask[1, 10:] = False, False
    with recording() as choices:
        mix(random_tensor(2, 33, 8, seed=0), Grid(32, prefix=1), token_mask=mask)
    seen = choices[0].call.layout.visible()
    assert seen[0, :, 1:].unique().tolist() == [5] and seen[1, :, 1:].unique().tolist() == [9]


@given(grid=GRIDS, rows=st.booleans(), tied=st.booleans(), seed=seeds())
def test_reconstruction(random_mix, by_hand, grid, rows, tied, seed):
    """Dense attention, and beside it a guess with all coefficients and the signs of the basis."""
    assume(not sequence(grid))
    extra = grid.prefix if rows else 0
    options = MaskReconstruction(2, grid.image_tokens, prefix=extra, tied=tied, reduce_tokens=2)
    mix = random_mix(options, head_dim=4, seed=seed)
    group, hand = mix.groups[0], by_hand(mix, grid)
    group.predicted = options
    x = random_tensor(2, grid.tokens, 8, seed=seed)
    found = mix.run(x, grid)
    dense = HeadMix(8, [Dense(2)]).double()
    dense.load_state_dict({name: one for name, one in mix.state_dict().items() if "predictor" not in name})
    torch.testing.assert_close(found.x, dense(x, grid), rtol=1e-9, atol=1e-9)
    guess = found.aux["0.guess"]
    q, k, _ = hand.projected(x)
    for item, head in itertools.product(range(2), range(2)):
        share = coefficients(group, q[item, head], k[item, head], [True] * grid.tokens, grid.prefix)
        torch.testing.assert_close(guess[item, head], share @ group.predictor.up.T, rtol=1e-9, atol=1e-9)
    guess.square().sum().backward()
    assert all(parameter.grad is not None for parameter in group.predictor.parameters())


def test_reconstruction_and_prediction_have_the_same_parameters():
    options = MaskPredictor(3, 16, 0.5, reduce_tokens=3, prefix=1)
    names = {name: one.shape for name, one in HeadMix(12, [options]).state_dict().items()}
    shared = {"reduce_tokens": 3, "prefix": 1}
    for other in (
        MaskReconstruction(3, 16, **shared),
        ThresholdMaskPredictor(3, 16, **shared),
        CompetingMaskPredictor(3, 16, 0.5, **shared),
    ):
        assert {name: one.shape for name, one in HeadMix(12, [other]).state_dict().items()} == names


def test_height_and_width_of_the_basis(random_mix):
    """64 tokens of 4 x 16 are no square image."""
    options = MaskPredictor(2, (4, 16), 0.3)
    wide = random_mix(options, head_dim=4)
    square = random_mix(replace(options, tokens=64), head_dim=4)
    x = random_tensor(1, 4, 16, 8, seed=0)
    assert torch.equal(wide.groups[0].predictor.up, square.groups[0].predictor.up)
    assert (wide(x) - square(x)).abs().max() > 1e-3
    assert torch.equal(wide(x), square(x.flatten(1, 2), Grid(64)).unflatten(1, (4, 16)))
    assert wide(random_tensor(1, 6, 9, 8, seed=0)).isfinite().all()


DROPPABLE = [
    Dense(2),
    MaskPredictor(2, 30, 0.3, prefix=1),
    MaskPredictor(2, 12, 0.3),
    ThresholdMaskPredictor(2, 30, score=0.3, prefix=1),
    MaskReconstruction(2, 30, prefix=1),
]


@pytest.mark.parametrize("options", DROPPABLE, ids=str)
@pytest.mark.parametrize("left", [1, 5, 29])
def test_dropped_tokens_are_masked_tokens(random_mix, options, left):
    grid, mix = Grid(5, 6, prefix=1), random_mix(options, head_dim=4)
    x = random_tensor(2, 31, 8, seed=3, grad=True)
    order = random_tensor(2, 30, seed=4).argsort(1)[:, :left].sort(1).values + 1
    places = torch.cat([torch.zeros(2, 1, dtype=torch.int64), order], dim=1)
    mask = torch.zeros(2, 31, dtype=torch.bool).scatter(1, places, True)
    rows = places[..., None].expand(-1, -1, 8)
    masked = mix.run(x, grid, token_mask=mask, prefix_weights=True)
    dropped = mix.run(x.gather(1, rows), grid, places=places, prefix_weights=True)
    right = masked.x.gather(1, rows)
    torch.testing.assert_close(dropped.x, right, rtol=1e-9, atol=1e-9)
    weights = masked.aux["0.prefix_weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    picked = weights.gather(3, places[:, None, None].expand(-1, 2, 1, -1))
    torch.testing.assert_close(dropped.aux["0.prefix_weights"], picked, rtol=1e-9, atol=1e-9)
    one, other = (torch.autograd.grad(found.square().sum(), x)[0] for found in (dropped.x, right))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options", [Window(2, 3), Conv(2), CompetingMaskPredictor(2, 30, 0.5), Dense(2, lepe=3)], ids=str
)
def test_mixes_that_need_all_tokens(options):
    mix = HeadMix(8, [options])
    places = torch.arange(4).expand(1, -1)
    with pytest.raises(ConfigError, match=r"this mix needs all tokens of its grid; mask those"):
        mix.run(torch.zeros(1, 4, 8), Grid(5, 6), places=places)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (torch.zeros(1, 4), r"places must be int64 \(B, N\) = \(1, 5\)"),
        (torch.zeros(1, 4, dtype=torch.int64), r"places must be int64 \(B, N\) = \(1, 5\)"),
        ([0, 1], r"places must be int64"),
    ],
)
def test_places_that_do_not_fit(places, says):
    with pytest.raises(ShapeError, match=says):
        HeadMix(8, [Dense(2)]).run(torch.zeros(1, 5, 8), Grid(5, 6), places=places)


def test_more_places_than_tokens():
    with pytest.raises(ShapeError, match=r"places are numbers of tokens of Grid\(2, 2\)"):
        HeadMix(8, [Dense(2)]).run(torch.zeros(1, 5, 8), Grid(2, 2), places=torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("options", [Dense(2), MaskPredictor(2, 30, 0.3, prefix=2), Window(2, 3)], ids=str)
def test_what_prefix_tokens_attend_to(random_mix, by_hand, options):
    grid, mix = Grid(5, 6, prefix=2), random_mix(options, head_dim=4)
    x, mask = random_tensor(2, 32, 8, seed=0), random_tensor(2, 32, seed=1) < 0.6
    q, k, _ = by_hand(mix, grid).projected(x)
    logits = (q[:, :, :2] @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    found = mix.run(x, grid, token_mask=mask, prefix_weights=True).aux["0.prefix_weights"]
    torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-9, atol=1e-9)
    assert "0.prefix_weights" not in mix.run(x, grid).aux


def test_prefix_weights_need_keys_that_are_tokens_and_no_bias():
    with pytest.raises(ConfigError, match="primitive 'window': weights of prefix tokens need the tokens' own keys"):
        HeadMix(8, [Window(2, 3, relative_bias=True)]).run(
            torch.zeros(1, 31, 8), Grid(5, 6, prefix=1), prefix_weights=True
        )


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        (MaskPredictor, {"keep": 0.0}, r"keep=0.0\): must be a share in \(0, 1\]"),
        (MaskPredictor, {"keep": 0.5, "tokens": 0}, r"tokens=0\): must be >= 1"),
        (MaskPredictor, {"keep": 0.5, "tokens": (3, 0)}, r"tokens=0\): must be >= 1"),
        (MaskPredictor, {"keep": 0.5, "least_share": -1.0}, r"least_share=-1.0\): must be >= 0"),
        (MaskPredictor, {"keep": 0.5, "prefix": -1}, r"prefix=-1\): must be >= 0 tokens"),
        (ThresholdMaskPredictor, {"score": math.inf}, r"score=inf\): must be a finite number"),
        (CompetingMaskPredictor, {"keep": 0.5, "score": math.nan}, r"score=nan\): must be a finite number"),
        (CompetingMaskPredictor, {"keep": 2.0}, r"keep=2.0\): must be a share in \(0, 1\]"),
    ],
)
def test_mistakes(options, arguments, says):
    with pytest.raises(ConfigError, match=says):
        options(2, **{"tokens": 9, **arguments})


def test_tied_projections_stay_tied():
    import copy

    mix = copy.deepcopy(randomize_parameters(HeadMix(8, [MaskPredictor(2, 9, 0.5, tied=True)]), seed=0)).double()
    predictor = mix.groups[0].predictor
    assert predictor.up is predictor.down
    assert sum("predictor" in name for name, _ in mix.named_parameters()) == 5
    assert torch.equal(mix.state_dict()["groups.0.predictor.up"], mix.state_dict()["groups.0.predictor.down"])


def test_one_head_group_sees_the_same_alone(random_mix):
    """`HeadInputs` as a third party would make them."""
    group = random_mix(ThresholdMaskPredictor(2, 9, score=-1.0), head_dim=4).groups[0]
    q, k, v = (random_tensor(1, 2, 9, 4, seed=at) for at in range(3))
    assert group.plan(HeadInputs(torch.zeros(1, 9, 8), q, k, v, Grid(3, 3))).layout.to_mask().all()
