"""Regions written out by hand, as the measure of the code that routes between them; never run in a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.primitives.base import HeadInputs
from attnkit.primitives.regions import PooledRegionOptions


def region_numbers(grid: Grid, lengths: Sequence[int], sides: int | Sequence[int]) -> Tensor:
    """Number of the region in which each image token lies, row-major: int64 (image tokens,)."""
    number = torch.zeros(grid.image_tokens, dtype=torch.int64)
    counts = [sides] * grid.ndim if isinstance(sides, int) else sides
    for at, length, count in zip(grid.coords().T, lengths, counts, strict=True):
        number = number * count + at // length
    return number


def seen_regions(
    inputs: HeadInputs, lengths: Sequence[int], sides: int | Sequence[int], topk: int, *, per_head: bool = False
) -> Tensor:
    """Which regions each image token is routed to, one mean after the other: bool (B, heads, image tokens, R)."""
    grid = inputs.grid
    q, k, _ = (one[:, :, grid.prefix :].detach().float() for one in inputs.qkv)
    region = region_numbers(grid, lengths, sides)
    count = sides**grid.ndim if isinstance(sides, int) else math.prod(sides)
    present = torch.ones(len(q), grid.image_tokens, dtype=torch.bool)
    if inputs.token_mask is not None:
        present = inputs.token_mask[:, grid.prefix :]
    sees = torch.zeros(*q.shape[:3], count, dtype=torch.bool)
    for item, here in enumerate(present):
        filled = region[here].unique().tolist()
        for mine in region.unique().tolist():
            rows = here & (region == mine)
            query = q[item, :, rows].mean(1) if rows.any() else torch.zeros_like(q[item, :, 0])
            scores = [(query * k[item, :, here & (region == one)].mean(1)).sum(-1) for one in filled]
            for head in range(q.shape[1]):
                each = [float(one[head] if per_head else one.sum()) for one in scores]
                best = sorted(filled, key=lambda one, each=each: -each[filled.index(one)])[:topk]
                sees[item, head] |= (region == mine)[:, None] & torch.tensor([one in best for one in range(count)])
    return sees


def cells_of(grid: Grid, lengths: Sequence[int], options: PooledRegionOptions) -> tuple[Tensor, Tensor]:
    """The cells whose means or maxima are keys; without pooling every image token is one.

    Returns:
        Number of the region in which each lies, int64 (cells,), and its image tokens, bool (cells, image tokens).
    """
    if options.pool == "none":
        return region_numbers(grid, lengths, options.regions), torch.eye(grid.image_tokens, dtype=torch.bool)
    numbers, members = [], []
    corners = itertools.product(range(options.regions), repeat=grid.ndim)
    for number, corner in enumerate(corners):
        for cell in itertools.product(*map(options.spans, lengths)):
            inside = torch.ones(grid.image_tokens, dtype=torch.bool)
            for at, side, length, (first, stop) in zip(grid.coords().T, corner, lengths, cell, strict=True):
                inside &= (at >= side * length + first) & (at < side * length + stop)
            numbers.append(number)
            members.append(inside)
    return torch.tensor(numbers), torch.stack(members)


def in_cells(rows: Tensor, inside: Tensor, inputs: HeadInputs, pool: str) -> tuple[Tensor, Tensor]:
    """What stands for cells behind the prefix tokens themselves.

    Args:
        rows: (B, heads, N, D).
        inside: bool (cells, image tokens).
        inputs: for grid and token mask.
        pool: `"max"`, or else means.

    Returns:
        (B, heads, prefix + cells, D), 0 for cells without a token; which cells hold one, bool (B, cells).
    """
    prefix, mask = inputs.grid.prefix, inputs.token_mask
    kept = torch.ones(len(rows), inputs.grid.tokens, dtype=torch.bool) if mask is None else mask
    members = inside & kept[:, None, prefix:]
    image, held = rows[:, :, prefix:], members.any(-1)
    found = []
    for member, any_ in zip(members.unbind(1), held.unbind(1), strict=True):
        there = member[:, None, :, None]
        if pool == "max":
            one = image.masked_fill(~there, -torch.inf).amax(2).where(any_[:, None, None], 0.0)
        else:
            one = (image * there).sum(2) / there.sum(2).clamp(min=1)
        found.append(one)
    return torch.cat([rows[:, :, :prefix], torch.stack(found, dim=2)], dim=2), held


def with_prefix(routed: Tensor, inputs: HeadInputs, held: Tensor) -> Tensor:
    """Which keys every token sees, prefix tokens seeing all and being seen by all: bool (B, heads, N, prefix + cells).

    Args:
        routed: which cells each image token is routed to, bool (B, heads, image tokens, cells).
        inputs: for grid and token mask.
        held: which cells may be seen at all, bool (B, cells).
    """
    prefix, mask = inputs.grid.prefix, inputs.token_mask
    kept = torch.ones(len(held), prefix, dtype=torch.bool) if mask is None else mask[:, :prefix]
    routed = torch.cat([routed.new_ones(*routed.shape[:2], prefix, routed.shape[3]), routed], dim=2)
    routed = torch.cat([routed.new_ones(*routed.shape[:3], prefix), routed], dim=3)
    return routed & torch.cat([kept, held], dim=1)[:, None, None]
