"""A made-up picture of sky, ground and two like things, on which content-dependent patterns can be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.mixes import GroupLike, Mix, read_groups
from attnkit.primitives.guesses import GuessHeads, Predictor

HEAD_DIM = 16

# Centre (row, column) and radius of the two like things, as shares of the picture's sides.
THINGS = ((0.32, 0.27, 0.17), (0.62, 0.77, 0.17))
HORIZON = 0.8


def scene_parts(grid: Grid) -> Tensor:
    """How much of each token is sky, ground and thing: (image tokens, 3), rows summing to 1."""
    sizes = (grid.height, grid.width)
    places = [(torch.arange(size) + 0.5) / size for size in sizes]
    row, column = torch.meshgrid(*places, indexing="ij")
    thing = torch.zeros(sizes)
    for y, x, radius in THINGS:
        distance = ((row - y) ** 2 + (column - x) ** 2).sqrt()
        thing = torch.maximum(thing, torch.sigmoid((radius - distance) * 30))
    ground = torch.sigmoid((row - HORIZON) * 25) * (1 - thing)
    return torch.stack([1 - thing - ground, ground, thing], dim=-1).reshape(-1, 3)


def scene_tokens(grid: Grid, dim: int) -> Tensor:
    """The picture as tokens (1, N, dim): each part has its own direction, and place adds a little."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.linalg.qr(torch.randn(max(dim, 5), 5, generator=generator)).Q[:dim].t()
    places = [torch.linspace(-0.2, 0.2, size) if size > 1 else torch.zeros(1) for size in (grid.height, grid.width)]
    row, column = torch.meshgrid(*places, indexing="ij")
    features = torch.cat([scene_parts(grid), torch.stack([row, column], -1).reshape(-1, 2)], dim=1)
    image = features @ directions * math.sqrt(dim)
    prefix = image.mean(0, keepdim=True).expand(grid.prefix, -1)
    return torch.cat([prefix, image])[None]


def scene_mix(groups: Mix | Sequence[GroupLike], grid: Grid, layer: int = 0) -> HeadMix:
    """A mix in which like attends to like: keys are made as queries are, and mask predictors are set by hand.

    The global random state is left alone.
    """
    mix = groups if isinstance(groups, Mix) else Mix(read_groups(groups))
    width = mix.dim or mix.heads * (mix.head_dim or HEAD_DIM)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = mix.build(width, layer).eval()
    place = 0
    with torch.no_grad():
        for columns, group in zip(made.columns, made.groups, strict=True):
            if made.qkv is not None and columns.q == columns.k:
                query, key = (made.qkv.weight[place + at : place + at + columns.q] for at in (0, columns.q))
                key.copy_(query)
            place += columns.q + columns.k + columns.v
            if isinstance(group, GuessHeads):
                _set_by_hand(group.predictor)
        if made.qkv is not None and made.qkv.bias is not None:
            made.qkv.bias.zero_()
    return made


def _set_by_hand(predictor: Predictor) -> None:
    """A basis of round spots that cover the image evenly, and a projection that keeps what it can of q and k."""
    rows, rank = predictor.up.shape
    tokens = rows - predictor.options.prefix
    side = math.isqrt(tokens)
    sizes = (side, side) if side * side == tokens else (1, tokens)
    place = Grid(*sizes).coords().float().add(0.5) / torch.tensor(sizes)
    spots = torch.tensor([[_radical(at + 1, 2), _radical(at + 1, 3)] for at in range(rank)])
    spots = spots if sizes[0] > 1 else torch.stack([torch.full((rank,), 0.5), (torch.arange(rank) + 0.5) / rank], 1)
    bumps = torch.exp(-((torch.cdist(place, spots) * math.sqrt(rank)) ** 2) / 0.5)
    predictor.up.zero_()[rows - tokens :] = bumps
    predictor.down.zero_()[rows - tokens :] = bumps / bumps.sum(0)
    for linear in (predictor.query, predictor.key):
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(linear.in_features, linear.out_features, generator=generator)
        linear.weight.copy_(5 * torch.linalg.qr(columns).Q.t())
        linear.bias.zero_()


def _radical(number: int, base: int) -> float:
    """The digits of a number mirrored at the point: evenly spread places in 0..1 (van der Corput)."""
    value, factor = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * factor
        factor /= base
    return value
