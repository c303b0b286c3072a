"""Sweep: all kernels of stencils that the table of configurations can start, compiled for GPUs that are not there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from attnkit.kernels.triton.devices import DEVICE_CLASSES
from attnkit.kernels.triton.launch import Launch
from attnkit.kernels.triton.stencil.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    KERNELS,
    PATH,
    Config,
    Direction,
    configuration,
)
from attnkit.kernels.triton.sweeping import Needs, Numbers, dtype_of, fingerprint_of, multiplying, needs_of

TITLE = "Stencils: neighborhoods and learned queries"
TABLES = {
    "forward": "Forward",
    "query_gradient": "Gradient of queries",
    "key_gradient": "Gradients of keys and values",
    "learned_forward": "Learned queries, forward",
    "learned_gradient": "Learned queries, gradients",
}
ROWS = ("numbers", "head dim")
COLUMNS = {str(size): f"windows up to {size} x {size}" for size in KERNELS}
COLUMNS[str(KERNELS[-1])] += " and more"

Kind: TypeAlias = Literal["bare", "tables", "everything"]
# What tables add to the numbers' name.
AND_TABLES = " and tables"
NUMBERS: tuple[Numbers, ...] = ("bfloat16", "float32", "tf32")
LEARNED: tuple[Direction, ...] = ("learned_forward", "learned_gradient")

# Which kernels take their configuration from which direction, or are compiled beside it; and those with products.
OWNED: dict[Direction, tuple[str, ...]] = {
    "forward": ("stencil_forward",),
    "query_gradient": ("stencil_query_gradient", "stencil_table_gradient", "stencil_pair_gradient"),
    "key_gradient": ("stencil_key_gradient", "stencil_prefix_gradient"),
    "learned_forward": ("learned_forward", "stencil_delta"),
    "learned_gradient": ("learned_gradient", "stencil_table_gradient", "stencil_prefix_gradient"),
}
MULTIPLIED = {
    "stencil_forward": ("ROWS1", "ROWS2"),
    "stencil_query_gradient": ("ROWS1", "ROWS2"),
    "stencil_key_gradient": ("ROWS1", "ROWS2"),
    "stencil_prefix_gradient": ("BLOCK_N",),
}
BATCH, HEADS, SIZE = 2, 8, 56
# A prefix of one token is compiled as a constant.
PREFIX = 5


class Line(NamedTuple):
    """A line of the table, for one class of devices, way to multiply and kind of calls.

    Attributes:
        device_class: one of `DEVICE_CLASSES`.
        direction: which result.
        numbers: one of `Numbers`.
        kernel: one of `KERNELS`, the side of a window.
        head_dim: one of `HEAD_DIMS`.
        kind: `"bare"`: no bias or gain. `"tables"`: a relative bias, for learned queries with a gain. `"everything"`:
            bias, gain, prefix tokens, masked keys and a gradient of the lse; the bias is one for every pair and, for
            queries of their own, windows are moved inside the grid and have dilations.
    """

    device_class: str
    direction: Direction
    numbers: Numbers
    kernel: int
    head_dim: int
    kind: Kind


def lines(devices: Sequence[str] = DEVICE_CLASSES, numbers: Sequence[Numbers] = NUMBERS) -> list[Line]:
    """The lines of the table for some classes of devices and ways to multiply, in all kinds of calls that are compiled
    to different code there. float16 shares bfloat16's lines."""
    spots = itertools.product(devices, DIRECTIONS, numbers, HEAD_DIMS, KERNELS)
    return [
        Line(device, direction, way, kernel, width, kind)
        for device, direction, way, width, kernel in spots
        for kind in _kinds(device, direction, way, width, kernel)
    ]


def name(line: Line) -> str:
    """The line's cell in the table, such as `"sm_90/forward/bfloat16 and tables/32/7"`."""
    numbers = line.numbers + AND_TABLES * (line.kind != "bare" and line.direction not in LEARNED)
    return "/".join((line.device_class, line.direction, numbers, str(line.head_dim), str(line.kernel)))


def cut(line: Line) -> str:
    """Rows x columns of a tile, warps and stages."""
    found = _config(*line)
    return f"{found.rows}x{found.columns}, {found.warps} w, {found.stages} s"


def launches(line: Line) -> list[Launch]:
    """The launches that belong to a line, from tensors without data."""
    # Here and below, so that lines and fingerprint need no Triton.
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import backward_of, forward_of

    dtype, learned, everything = dtype_of(line.numbers), line.direction in LEARNED, line.kind == "everything"
    made = partial(torch.empty, device="meta")
    prefix = PREFIX if everything else 0
    tokens = prefix + SIZE * SIZE
    if learned:
        # As the primitive makes them: scores in float32, values of all heads of a token beside each other.
        q = made(1, 1, 1, 1).expand(BATCH, HEADS, 1, 1)
        k = made(BATCH, tokens, HEADS, 1).transpose(1, 2)
        v = made(BATCH, tokens, HEADS, line.head_dim, dtype=dtype).transpose(1, 2)
    else:
        # As a fused projection leaves them.
        q, k, v = made(BATCH, tokens, 3, HEADS, line.head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        q = q[:, :, prefix:]
    places = prefix + line.kernel**2
    bias = gain = seen = None
    if line.kind != "bare":
        sides = (SIZE, SIZE) if everything else (1, 1)
        bias = made(1, HEADS, places, *sides)
        gain = made(1, HEADS, places, 1, 1) if learned or everything else None
    if everything:
        seen = made(BATCH, 1, tokens, dtype=torch.bool)
    clamped, dilation = everything and not learned, 2 if everything else 1
    window = ([SIZE, SIZE], prefix, [line.kernel] * 2, [1, 1], [dilation] * 2, clamped, 0.125)
    windows = Windows(bias, gain, seen, *window)
    with multiplying(line.numbers):
        first = forward_of(q, k, v, windows, line.device_class)
        grads = torch.empty_like(first.out), torch.empty_like(first.total) if everything else None
        needs = [not learned, True, True, bias is not None, gain is not None]
        left = (first.out, first.total, first.peak)
        found = backward_of(*grads, *left, q, k, v, windows, needs, line.device_class).launches
    return [one for one in [first.launch, *found] if one.kernel.__name__ in OWNED[line.direction]]


def needs(line: Line) -> list[Needs]:
    """Compiles the kernels of a line."""
    return needs_of(line.device_class, [(one, _multiplied(line, one)) for one in launches(line)])


def fingerprint() -> str:
    """A number that changes with the kernels, how they are started, and the table, but not with comments."""
    return fingerprint_of(Path(__file__).parent, PATH)


def _config(
    device_class: str, direction: Direction, numbers: Numbers, kernel: int, head_dim: int, kind: Kind
) -> Config:
    tables, rounded = kind != "bare", numbers == "tf32"
    return configuration(direction, kernel, head_dim, dtype_of(numbers), device_class, tables, rounded)


def _kinds(device: str, direction: Direction, numbers: Numbers, width: int, kernel: int) -> Iterator[Kind]:
    """The kinds of calls that a line is compiled for: not those whose code another line has."""
    learned = direction in LEARNED
    if learned and numbers == "tf32":
        return
    kinds: tuple[Kind, ...] = ("tables", "everything") if learned else ("bare", "tables", "everything")
    for kind in kinds:
        given = (device, direction, numbers)
        # The window's size is no constant of the code.
        if kernel == KERNELS[0] or _config(*given, kernel, width, kind) != _config(*given, KERNELS[0], width, kind):
            yield kind


def _multiplied(line: Line, launch: Launch) -> int:
    """Rows of the result that tensor cores are to multiply; float32 itself only those of AMD do."""
    sides = MULTIPLIED.get(launch.kernel.__name__)
    if sides is None or (line.numbers == "float32" and line.device_class != "gfx942"):
        return 0
    rows = 1
    for side in sides:
        rows *= int(launch.constants[side] or 0)
    return rows
