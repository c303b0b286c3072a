"""Stencils: neighborhoods and learned queries, on maps that patches divide and on maps that they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.triton.stencil import sweep
from attnkit_models.bench.tuning.lines import Given, Line, Scene, Started
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Limits

PAIR = STENCIL
TITLES = {
    "forward": "output",
    "query_gradient": "gradient of q",
    "key_gradient": "gradients of k and v",
    "learned_forward": "output of learned queries",
    "learned_gradient": "gradients of the scores and v of learned queries",
}
# Places along a side of the window that stands for each line of the table.
KERNELS = {7: 7, 15: 13}
PREFIX = 1


def title(line: Line) -> str:
    """What is made, in words."""
    return TITLES[line.direction]


def scenes(line: Line) -> Mapping[str, Scene]:
    """Plain windows; and behind a class token those of NAT with a dilation, or of learned queries with a stride."""
    words = f"windows of {KERNELS[line.size]} x {KERNELS[line.size]}"
    if _learned(line):
        return {
            f"{words}, bias and gain": partial(_scores, line, 1),
            f"{words}, bias, stride 2, a class token": partial(_scores, line, 2),
        }
    return {
        words: partial(_windows, line, False),
        f"{words} moved inside, dilation 2, a class token": partial(_windows, line, True),
    }


def limits(line: Line) -> Limits:
    """Learned queries have no products of matrices, and as many numbers as a token's heads have beside each other."""
    return Limits((8, 128), (32, 512)) if _learned(line) else Limits((16, 128), (16, 128))


def forward(given: Given, device_class: str) -> Started:
    """The forward pass."""
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import forward_of

    q, k, v, *rest = given.arguments
    found = forward_of(q, k, v, Windows(*rest), device_class)
    return Started([found.launch], lambda: found[1:])


def backward(given: Given, outputs: Sequence[Tensor], grad: Tensor, device_class: str) -> Started:
    """The backward pass."""
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import backward_of

    q, k, v, *rest = given.arguments
    out, total, peak = outputs
    found = backward_of(grad, None, out, total, peak, q, k, v, Windows(*rest), given.needs, device_class)

    def results() -> list[Tensor]:
        for fill in found.after:
            fill()
        return [one for one in found.gradients if one is not None]

    return Started(found.launches, results)


def timed(line: Line, steps: Sequence[Any]) -> list[Any]:
    """The one launch that takes the line: sums over queries are cut as they are."""
    kernel = line.direction if _learned(line) else f"stencil_{line.direction}"
    return [step for step in steps if step.kernel.__name__ == kernel]


def _learned(line: Line) -> bool:
    return line.direction in sweep.LEARNED


def _windows(line: Line, moved: bool, room: Room) -> Given:
    kernel, dilation, prefix = KERNELS[line.size], 1 + moved, PREFIX * moved
    side = _side(room, moved)
    q, k, v = room.projected(prefix + side**2, line.head_dim, line.dtype)
    bias = None
    if line.tables:
        # Beside the border places of a window that is moved inside are other steps away: a number for each query.
        sides = (side, side) if moved else (1, 1)
        bias = room.normal(1, room.heads, prefix + kernel**2, *sides)
    window = ([side, side], prefix, [kernel] * 2, [1, 1], [dilation] * 2, moved, line.head_dim**-0.5)
    return Given((q[:, :, prefix:], k, v, bias, None, None, *window), [True, True, True, line.tables, False])


def _scores(line: Line, stride: int, room: Room) -> Given:
    kernel, ragged = KERNELS[line.size], stride > 1
    prefix, side = PREFIX * ragged, _side(room, ragged)
    tokens, made = prefix + side**2, (room.images, room.heads)
    # As the primitive makes them: scores in float32, values of all heads of a token beside each other.
    q = torch.ones(1, 1, 1, 1, device=room.device).expand(*made, 1, 1)
    k = room.normal(room.images, tokens, room.heads, 1).transpose(1, 2)
    v = room.normal(room.images, tokens, room.heads, line.head_dim, dtype=line.dtype).transpose(1, 2)
    bias, gain = (room.normal(1, room.heads, prefix + kernel**2, 1, 1) for _ in range(2))
    window = ([side, side], prefix, [kernel] * 2, [stride] * 2, [1, 1], False, 1.0)
    return Given((q, k, v, bias, None if ragged else gain, None, *window), [False, True, True, True, not ragged])


def _side(room: Room, ragged: bool) -> int:
    """Tokens along a side: 56 of 64, which patches divide, or 59."""
    return room.side * 7 // 8 + 3 * ragged
