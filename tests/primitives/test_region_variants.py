"""Pooled, soft and padded routing between regions against loops over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from attnkit import Grid, HeadMix, PaddedTopKRegion, SoftTopKRegion, TopKRegion
from attnkit.errors import ConfigError
from attnkit.testing import random_tensor
from attnkit.testing.strategies import grids, seeds

HEADS, HEAD_DIM, QK_DIM = 2, 2, 6
SMALL = grids(max_height=6, max_width=6, max_prefix=2)


class Loops:
    """The columns of a mix with one group of region heads, and its regions as lists of tokens."""

    def __init__(self, mix, grid, lengths):
        self.mix, self.grid = mix, grid
        self.token = {place: grid.prefix + at for at, place in enumerate(itertools.product(*map(range, grid.sizes)))}
        self.lengths = lengths
        options = mix.options[0]
        sides = [-(-size // length) for size, length in zip(grid.sizes, lengths, strict=True)]
        if not isinstance(options, PaddedTopKRegion):
            sides = [options.regions] * grid.ndim
        self.corners = list(itertools.product(*map(range, sides)))
        self.regions = [self.tokens(corner, [(0, length) for length in lengths]) for corner in self.corners]
        self.real = [at for at, tokens in enumerate(self.regions) if tokens]

    def tokens(self, corner, spans):
        """Existing tokens of a region between two places in it along each axis."""
        axes = [
            range(at * length + first, at * length + last)
            for at, length, (first, last) in zip(corner, self.lengths, spans, strict=True)
        ]
        return [self.token[place] for place in itertools.product(*axes) if place in self.token]

    def columns(self, x):
        """q, k and v of every head: (B, heads, N, width)."""
        widths = [QK_DIM, QK_DIM, HEADS * HEAD_DIM]
        parts = nn.functional.linear(x, self.mix.qkv.weight, self.mix.qkv.bias).split(widths, dim=-1)
        return [torch.stack(part.chunk(HEADS, dim=-1), dim=1) for part in parts]

    def matches(self, q, k):
        """Products of region means over all heads of one item: {(query region, key region): number}."""
        means = [{at: one[:, self.regions[at]].mean(1).flatten() for at in self.real} for one in (q, k)]
        return {(one, other): means[0][one] @ means[1][other] for one in self.real for other in self.real}

    def best(self, matches, region, topk):
        """The regions a region sees, if rounding cannot change them."""
        numbers = {other: float(matches[region, other].detach()) for other in self.real}
        ranked = sorted(self.real, key=lambda other: -numbers[other])
        if topk < len(ranked):
            assume(numbers[ranked[topk - 1]] - numbers[ranked[topk]] > 1e-4)
        return ranked[:topk]

    def out(self, rows):
        """(heads, D) per token -> (N, C)."""
        joined = torch.stack([row.flatten() for row in rows])
        return joined @ self.mix.proj.weight.T + self.mix.proj.bias


def softmax_over(q, k, v, scale):
    """One query (heads, D) over keys (heads, K, D)."""
    weights = ((k @ q[..., None])[..., 0] * scale).softmax(-1)
    return (weights[..., None] * v).sum(1)


def attended(loops, x, keys_of, scale=(QK_DIM // HEADS) ** -0.5):
    """All tokens of all items: `keys_of(q, k, v)` gives keys and values (heads, K, D) per region, and "all"."""
    items = []
    for q, k, v in zip(*loops.columns(x), strict=True):
        keys = keys_of(q, k, v)
        region = {token: at for at, tokens in enumerate(loops.regions) for token in tokens}
        prefix = [one[:, : loops.grid.prefix] for one in (k, v)]
        rows = []
        for token in range(loops.grid.tokens):
            seen = keys[region[token]] if token in region else keys["all"]
            near = [torch.cat([one, other], dim=1) for one, other in zip(prefix, seen, strict=True)]
            rows.append(softmax_over(q[:, token], *near, scale))
        items.append(loops.out(rows))
    return torch.stack(items)


def ceiled(grid, regions):
    return [-(-size // regions) for size in grid.sizes]


def spans(options, length):
    if options.pool_cells:
        return [
            (at * length // options.pool_cells, -(-(at + 1) * length // options.pool_cells))
            for at in range(options.pool_cells)
        ]
    size = min(options.pool_size, length)
    return [(start, start + size) for start in range(0, length - size + 1, size)]


def cells_of(loops, options, k, v):
    """Keys and values of every region, (heads, cells, D)."""
    found = {}
    for at, corner in enumerate(loops.corners):
        held = [[at] for at in loops.regions[at]]
        if options.pool != "none":
            cuts = itertools.product(*(spans(options, length) for length in loops.lengths))
            held = [tokens for cut in cuts if (tokens := loops.tokens(corner, cut))]
        if held:
            reduce = {"max": lambda rows: rows.amax(1)}.get(options.pool, lambda rows: rows.mean(1))
            found[at] = [torch.stack([reduce(one[:, tokens]) for tokens in held], dim=1) for one in (k, v)]
    return found


def joined(parts):
    return [torch.cat(list(each), dim=1) for each in zip(*parts, strict=True)]


POOLS = st.sampled_from(
    [
        {"pool": "mean", "pool_cells": 2},
        {"pool": "max", "pool_cells": 2},
        {"pool": "mean", "pool_size": 2},
        {"pool": "max", "pool_size": 2},
        {"pool": "mean", "pool_cells": 3},
    ]
)


@given(grid=SMALL, regions=st.integers(1, 4), topk=st.integers(1, 5), pool=POOLS, seed=seeds())
def test_pooled_keys(random_mix, agree, grid, regions, topk, pool, seed):
    options = TopKRegion(HEADS, regions, topk, qk_dim=QK_DIM, **pool)
    mix = random_mix(options, head_dim=HEAD_DIM, seed=seed)
    loops = Loops(mix, grid, ceiled(grid, regions))

    def keys_of(q, k, v):
        cells, matches = cells_of(loops, options, k, v), loops.matches(q.detach(), k.detach())
        found = {at: joined([cells[other] for other in loops.best(matches, at, topk)]) for at in loops.real}
        return {**found, "all": joined(cells.values())}

    agree(mix, grid, lambda x: attended(loops, x, keys_of), seed=seed)


@pytest.mark.parametrize("router", ["means", "linear", "detached"])
@given(
    grid=SMALL,
    regions=st.integers(1, 4),
    topk=st.integers(1, 5),
    pool=st.just({}) | POOLS,
    scale=st.sampled_from(["head", "group", 0.7]),
    seed=seeds(),
)
def test_soft_routing(router, random_mix, agree, grid, regions, topk, pool, scale, seed):
    options = SoftTopKRegion(HEADS, regions, topk, qk_dim=QK_DIM, router=router, scale=scale, **pool)
    mix = random_mix(options, head_dim=HEAD_DIM, seed=seed)
    loops, linear = Loops(mix, grid, ceiled(grid, regions)), mix.groups[0].router
    number = {"head": (QK_DIM // HEADS) ** -0.5, "group": QK_DIM**-0.5}.get(scale, scale)

    def routed(means):
        return means if linear is None else linear(means)

    def keys_of(q, k, v):
        cells = cells_of(loops, options, k, v)
        means = [{at: routed(one[:, loops.regions[at]].mean(1).flatten()) for at in loops.real} for one in (q, k)]
        found = {}
        for at in loops.real:
            matches = {(at, other): number * (means[0][at] @ means[1][other]) for other in loops.real}
            chosen = loops.best(matches, at, topk)
            weights = torch.stack([matches[at, other] for other in chosen]).softmax(0)
            if router == "detached":
                weights = weights.detach()
            found[at] = joined(
                [[weight * one for one in cells[other]] for weight, other in zip(weights, chosen, strict=True)]
            )
        return {**found, "all": [k[:, grid.prefix :], v[:, grid.prefix :]]}

    agree(mix, grid, lambda x: attended(loops, x, keys_of, number), seed=seed)


@given(grid=SMALL, regions=st.integers(1, 4), topk=st.integers(1, 5), seed=seeds())
def test_padded_regions(random_mix, agree, grid, regions, topk, seed):
    mix = random_mix(PaddedTopKRegion(HEADS, regions, topk, qk_dim=QK_DIM), head_dim=HEAD_DIM, seed=seed)
    lengths = [max(size // regions, 1) for size in grid.sizes]
    loops = Loops(mix, grid, lengths)

    def filled(one, at):
        empty = lengths[0] * lengths[1] - len(loops.regions[at])
        return torch.cat([one[:, loops.regions[at]], one.new_zeros(HEADS, empty, one.shape[2])], dim=1)

    def keys_of(q, k, v):
        matches = loops.matches(q.detach(), k.detach())
        parts = {at: [filled(one, at) for one in (k, v)] for at in loops.real}
        found = {at: joined([parts[other] for other in loops.best(matches, at, topk)]) for at in loops.real}
        return {**found, "all": joined(parts.values())}

    agree(mix, grid, lambda x: attended(loops, x, keys_of), seed=seed)


@pytest.mark.parametrize("options", [SoftTopKRegion(2, 3, 2), PaddedTopKRegion(2, 4, 3)])
def test_masked_tokens_do_not_matter(random_mix, options):
    """Beside the laws: what a masked token holds changes nothing, and masking changes something."""
    grid, mix = Grid(5, 7, prefix=1), random_mix(options)
    x = random_tensor(2, 36, 4, seed=1)
    mask = random_tensor(2, 36, seed=2) < 0.7
    out = mix(x, grid, token_mask=mask)
    spoilt = mix(x.where(mask[..., None], torch.nan), grid, token_mask=mask)
    torch.testing.assert_close(out[mask], spoilt[mask])
    assert (out[mask] - mix(x, grid)[mask]).abs().max() > 1e-3


def test_padding_takes_softmax_weight(random_mix):
    """Values that are all 1 come out as the share of keys that exist where all logits are 0."""
    mix = random_mix(PaddedTopKRegion(1, 2, 9))
    with torch.no_grad():
        mix.qkv.weight.zero_()
        mix.qkv.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
        mix.proj.weight.copy_(torch.eye(2))
        mix.proj.bias.zero_()
    out = mix(random_tensor(1, 5, 5, 2, seed=0))
    torch.testing.assert_close(out, torch.full_like(out, 25 / 36))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk_dim": 5}, r"qk_dim=5\): must be a multiple of heads=2"),
        ({"qk_dim": 0}, r"qk_dim=0\): must be >= 1"),
        ({"pool": "mean"}, r"pool='mean'\): needs pool_cells or pool_size, one of the two"),
        ({"pool": "max", "pool_cells": 1, "pool_size": 1}, r"pool='max'\): needs pool_cells or pool_size, one of"),
        ({"pool_cells": 2}, r"pool_cells=2\): goes with pool='mean' or pool='max'"),
    ],
)
@pytest.mark.parametrize("options", [TopKRegion, SoftTopKRegion])
def test_mistakes(options, arguments, message):
    with pytest.raises(ConfigError, match=message):
        options(2, 3, 4, **arguments)


def test_narrow_queries_and_keys():
    mix = HeadMix(12, [TopKRegion(3, 2, 1, qk_dim=6)])
    assert mix.qkv.weight.shape == (6 + 6 + 12, 12)
    assert mix.groups[0].scale == 2**-0.5
    assert HeadMix(12, [TopKRegion(3, 2, 1, qk_dim=6, scale="group")]).groups[0].scale == 6**-0.5
