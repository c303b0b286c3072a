"""Token sets: lists and masks as low-rank scores give them, so that neighbours share many of their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkit.kernels.ops.token_sets import TOKEN_SETS, SetTables
from attnkit.kernels.triton.token_sets import sweep
from attnkit_models.bench.tuning.lines import Given, Line, Scene, Started
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Limits

PAIR = TOKEN_SETS
TITLES = {
    "forward": "output, and lists of tiles of queries",
    "query_gradient": "gradient of q, and lists of tiles of queries",
    "key_gradient": "gradients of k and v, and lists of tiles of keys",
}
# Patterns that scores are sums of, and tokens along a side over which these change.
RANK, SMOOTH = 8, 7
# Share of its keys that a query keeps.
KEPT = 4
PREFIX = 1


def title(line: Line) -> str:
    """What is made, in words."""
    return TITLES[line.direction]


def scenes(line: Line) -> Mapping[str, Scene]:
    """Lists of each head on a small map, behind a class token; and a mask for all heads on a large one."""
    return {
        "lists of a quarter of the keys for each head, a class token": partial(_lists, line),
        "a mask of a quarter of the keys for all heads": partial(_masked, line),
    }


def limits(line: Line) -> Limits:
    """Of 64 rows a word tells who sees a key."""
    return Limits((16, 64), (16, 128))


def forward(given: Given, device_class: str) -> Started:
    """The forward pass."""
    from attnkit.kernels.triton.token_sets.launches import forward_of

    q, k, v, *rest = given.arguments
    found = forward_of(q, k, v, SetTables(*rest), device_class)
    return Started(found.steps, lambda: found[1:])


def backward(given: Given, outputs: Sequence[Tensor], grad: Tensor, device_class: str) -> Started:
    """The backward pass."""
    from attnkit.kernels.triton.token_sets.launches import backward_of

    q, k, v, *rest = given.arguments
    tables, (out, total, peak) = SetTables(*rest), outputs
    found = backward_of(grad, None, out, total, peak, q, k, v, tables, given.needs, device_class)

    def results() -> list[Tensor]:
        asked = [one for one in found.gradients if one is not None]
        if found.bias is not None:
            assert tables.bias is not None
            asked.append(found.bias.sum_to_size(tables.bias.shape))
        return asked

    return Started(found.steps, results)


def timed(line: Line, steps: Sequence[Any]) -> list[Any]:
    """The launches of the kernels of its direction, and what makes lists of as many rows as it has, right before."""
    kernels, found, before = sweep.KERNELS[line.direction], [], []  # type: ignore[index]
    for step in steps:
        name = step.kernel.__name__ if hasattr(step, "kernel") else ""
        before.append(step)
        if name in kernels:
            found += before
        if name not in ("", *sweep.KERNELS["lists"]):
            before = []
    return found


def _lists(line: Line, room: Room) -> Given:
    side = room.side * 7 // 16
    # Lists of each head take more memory than what they list.
    q, k, v = (one[: -(-room.images // 2)] for one in room.projected(PREFIX + side**2, line.head_dim, line.dtype))
    scores, order = _scores(room, side, q.shape[0], room.heads)
    index = PREFIX + scores.topk(max(side**2 // KEPT, 1)).indices
    bias = room.normal(1, room.heads, PREFIX + side**2, PREFIX + side**2) if line.tables else None
    arguments = (q, k, v, index, None, bias, PREFIX, PREFIX, line.head_dim**-0.5, order)
    return Given(arguments, [True, True, True, line.tables])


def _masked(line: Line, room: Room) -> Given:
    side = room.side * 7 // 8
    # Pairs grow with the square of the tokens.
    q, k, v = (one[: -(-room.images // 8)] for one in room.projected(side**2, line.head_dim, line.dtype))
    scores, order = _scores(room, side, q.shape[0], 1)
    least = scores.topk(max(side**2 // KEPT, 1)).values[..., -1:]
    # One for each key, as tokens have it that stand for several.
    bias = room.normal(1, room.heads, 1, side**2, dtype=line.dtype) if line.tables else None
    arguments = (q, k, v, scores >= least, None, bias, 0, 0, line.head_dim**-0.5, order)
    return Given(arguments, [True, True, True, line.tables])


def _scores(room: Room, side: int, images: int, heads: int) -> tuple[Tensor, Tensor]:
    """Scores (B, heads, N, N), sums of few patterns that change slowly over the map, and the order (B, heads, N) of
    queries by the pattern of which they have most."""
    queries, keys = (
        F.interpolate(room.normal(images * heads, RANK, SMOOTH, SMOOTH), size=(side, side), mode="bilinear").flatten(2)
        for _ in range(2)
    )
    order = queries.argmax(1).argsort(dim=-1, stable=True).int()
    scores = torch.einsum("brq,brk->bqk", queries, keys)
    return scores.unflatten(0, (images, heads)), order.unflatten(0, (images, heads))
