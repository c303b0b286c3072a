"""Blocks: routed regions that fill their tiles, by an index for all heads and for each, and windows that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.kernels.ops.blocks import BLOCKS, BlockTables
from attnkit.kernels.triton.blocks import sweep
from attnkit.kernels.triton.blocks.configs import REGION_SIZES, WINDOW
from attnkit.layouts import Blocks
from attnkit_models.bench.tuning.lines import Given, Line, Scene, Started
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Limits

PAIR = BLOCKS
TITLES = {"forward": "output", "query_gradient": "gradient of q", "key_gradient": "gradients of k and v"}
# Tokens along a side of the square regions that stand for each line of the table, and of windows that leave gaps.
SIDES = {16: 4, 32: 5, 64: 8, 128: 16}
RAGGED = {16: 3, 32: 5, 64: 7, 128: 10}
PREFIX = 1
# Tokens that a region sees, about.
SEEN = 256


def title(line: Line) -> str:
    """What is made, in words."""
    return TITLES[line.direction]


def scenes(line: Line) -> Mapping[str, Scene]:
    """Regions as BiFormer routes them; the same with an index for each head and regions that most of all see; and
    windows behind a class token, at whose bias the backward pass arrives too."""
    regions = f"routed regions of {SIDES[line.size] ** 2} tokens"
    return {
        regions: partial(_routed, line, False),
        f"{regions}, an index for each head": partial(_routed, line, True),
        f"windows of {RAGGED[line.size] ** 2} tokens with a class token": partial(_windows, line),
    }


def limits(line: Line) -> Limits:
    """More rows than a region has would be padding."""
    return Limits((16, line.size), (16, 128))


def forward(given: Given, device_class: str) -> Started:
    """The forward pass."""
    from attnkit.kernels.triton.blocks.launches import forward_of

    q, k, v, *rest = given.arguments
    found = forward_of(q, k, v, BlockTables(*rest), device_class)
    return Started([found.launch], lambda: found[1:])


def backward(given: Given, outputs: Sequence[Tensor], grad: Tensor, device_class: str) -> Started:
    """The backward pass."""
    from attnkit.kernels.triton.blocks.launches import backward_of

    q, k, v, *rest = given.arguments
    out, total, peak = outputs
    found = backward_of(grad, None, out, total, peak, q, k, v, BlockTables(*rest), given.needs[:4], device_class)

    def results() -> list[Tensor]:
        for shares, target in found.sums:
            target.copy_(shares.sum(0))
        return [one for one in found.gradients if one is not None]

    return Started(found.launches, results)


def timed(line: Line, steps: Sequence[Any]) -> list[Any]:
    """The launches of the kernels of its direction; a prefix always takes the line of the smallest regions."""
    kernels = set(sweep.KERNELS[line.direction])  # type: ignore[index]
    if line.size != REGION_SIZES[0]:
        kernels.discard("blocks_prefix_gradient")
    return [step for step in steps if step.kernel.__name__ in kernels]


def _routed(line: Line, each: bool, room: Room) -> Given:
    side = SIDES[line.size]
    regions = max(room.side // side, 2)
    across = regions * side
    wanted = room.uniform(room.images, room.heads if each else 1, regions**2, regions**2)
    if each:
        wanted += room.uniform(room.images, room.heads, 1, regions**2)
    index = wanted.topk(min(max(SEEN // side**2, 4), regions**2 // 2)).indices
    layout = Blocks.from_regions(attnkit.Grid(across, across), regions, index, unique=True)
    # A bias of routed pairs has no gradient here: nobody learns one for places in a list.
    return _given(line, layout, line.dtype, room, learned=False)


def _windows(line: Line, room: Room) -> Given:
    side = RAGGED[line.size]
    # Windows do not divide it.
    across = max(room.side // side, 2) * side - 1
    layout = Blocks.windows(attnkit.Grid(across, across, prefix=PREFIX), side, device=room.device)
    tokens, width = WINDOW[line.dtype.itemsize]
    if line.backward and line.size <= tokens and line.head_dim <= width:
        # Without an index they have a kernel of their own for all gradients, which takes no line. By an index every
        # window sees itself as well.
        count = layout.order.token.shape[2]
        layout = replace(layout, index=torch.arange(count, device=room.device).view(1, 1, count, 1))
    # As models in half precision have it.
    return _given(line, layout, torch.float32, room, learned=True)


def _given(line: Line, layout: Blocks, bias_dtype: torch.dtype, room: Room, *, learned: bool) -> Given:
    order, bias = layout.order, None
    q, k, v = room.projected(layout.num_queries, line.head_dim, line.dtype)
    if line.tables:
        bias = room.normal(1, room.heads, 1, order.token.shape[3], layout.key_slots, dtype=bias_dtype)
    padded = [order.padded, order.padded]
    cuts = (order.token, order.slot, order.token, order.slot, layout.index, None)
    arguments = (q, k, v, *cuts, bias, layout.prefix, padded, line.head_dim**-0.5, None)
    return Given(arguments, [True, True, True, learned and line.tables, False])
