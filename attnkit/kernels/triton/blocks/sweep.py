"""Sweep: all kernels of blocks that the table of configurations can start, compiled for GPUs that are not there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.blocks.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    PATH,
    REGION_SIZES,
    WINDOW,
    Direction,
    configuration,
)
from attnkit.kernels.triton.devices import DEVICE_CLASSES
from attnkit.kernels.triton.launch import Launch
from attnkit.kernels.triton.sweeping import Needs, Numbers, dtype_of, fingerprint_of, multiplying, needs_of

TITLE = "Blocks: routed regions and windows"
TABLES = {
    "forward": "Forward",
    "query_gradient": "Gradient of queries",
    "key_gradient": "Gradients of keys and values",
    "window_gradient": "All gradients of small windows",
}
ROWS = ("numbers", "head dim")
COLUMNS = {str(size): f"regions of {size}" for size in REGION_SIZES}
COLUMNS[str(REGION_SIZES[-1])] += " and more"

# Small windows have a kernel that takes no configuration, and is shown beside the directions that do.
Shown: TypeAlias = Literal[Direction, "window_gradient"]
SHOWN: tuple[Shown, ...] = (*DIRECTIONS, "window_gradient")
Kind: TypeAlias = Literal["whole", "prefix", "ragged", "windows"]
# What a bias adds to the numbers' name in the table.
AND_BIAS = " and bias"
NUMBERS: tuple[Numbers, ...] = ("bfloat16", "float32", "tf32")

# Which kernels take their configuration from which direction, and those of them that multiply nothing.
KERNELS: dict[Shown, tuple[str, ...]] = {
    "forward": ("blocks_forward",),
    "query_gradient": ("blocks_query_gradient", "blocks_bias_gradient"),
    "key_gradient": ("blocks_key_gradient", "blocks_key_parts", "blocks_prefix_gradient"),
    "window_gradient": ("blocks_window_gradient",),
}
WITHOUT_PRODUCTS = ("blocks_key_parts",)

# Tokens of regions that do not fill their tiles; windows fill every other tile.
RAGGED = {16: 9, 32: 25, 64: 49, 128: 100}
WINDOWS = {16: 9, 32: 32, 64: 49, 128: 128}
# The tile for which float32, and what has a bias or a prefix, is compiled in whole tiles too.
ONE_TILE = 64
# What windows are compiled for where they run the kernels of regions: tiles, and widths, the first one with a bias.
ODD = (64, 128), (32, 128)
# A prefix of one token is compiled as a constant.
PREFIX = {"ragged": 1, "prefix": 5}
BATCH, HEADS, BLOCKS, TOPK = 2, 4, 64, 4


class Line(NamedTuple):
    """A line of the table, for one class of devices, way to multiply and kind of calls.

    Attributes:
        device_class: one of `DEVICE_CLASSES`.
        direction: which result, or `"window_gradient"`: all of them by one program a window, which needs no index.
        numbers: one of `Numbers`.
        tile: one of `REGION_SIZES`.
        head_dim: one of `HEAD_DIMS`.
        kind: `"whole"`: regions that fill their tiles. `"prefix"`: the same beside prefix tokens, with a gradient of
            the lse. `"ragged"`: regions that leave gaps, beside a prefix token, masked keys, a gradient of the lse and
            an index for each head. `"windows"`: no index, and queries and keys three quarters as wide as their tiles.
        bias: whether there is one; of the numbers' dtype for whole regions and windows, else float32.
    """

    device_class: str
    direction: Shown
    numbers: Numbers
    tile: int
    head_dim: int
    kind: Kind
    bias: bool


def lines(devices: Sequence[str] = DEVICE_CLASSES, numbers: Sequence[Numbers] = NUMBERS) -> list[Line]:
    """The lines of the table for some classes of devices and ways to multiply, in all kinds of calls that are compiled
    to different code there. float16 shares bfloat16's lines."""
    spots = itertools.product(devices, SHOWN, numbers, (False, True), HEAD_DIMS, REGION_SIZES)
    return [
        Line(device, direction, way, tile, width, kind, bias)
        for device, direction, way, bias, width, tile in spots
        for kind in _kinds(direction, way, tile, width, bias)
    ]


def name(line: Line) -> str:
    """The line's cell in the table, such as `"sm_90/forward/bfloat16 and bias/32/64"`."""
    numbers = line.numbers + AND_BIAS * line.bias
    return "/".join((line.device_class, line.direction, numbers, str(line.head_dim), str(line.tile)))


def cut(line: Line) -> str:
    """Rows x columns of a tile, warps and stages."""
    if line.direction == "window_gradient":
        launch = launches(line)[0]
        rows, columns = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
        return f"{rows}x{columns}, {launch.warps} w"
    dtype, rounded = dtype_of(line.numbers), line.numbers == "tf32"
    found = configuration(line.direction, line.tile, line.head_dim, dtype, line.device_class, line.bias, rounded)
    return f"{found.rows}x{found.columns}, {found.warps} w, {found.stages} s"


def launches(line: Line) -> list[Launch]:
    """The launches that take their configuration from a line, from tensors without data."""
    # Here and below, so that lines and fingerprint need no Triton.
    from attnkit.kernels.triton.blocks.launches import backward_of, forward_of

    dtype, ragged = dtype_of(line.numbers), line.kind == "ragged"
    made = partial(torch.empty, device="meta")
    prefix = PREFIX.get(line.kind, 0)
    tokens = {"ragged": RAGGED, "windows": WINDOWS}.get(line.kind, {}).get(line.tile, line.tile)
    width = line.head_dim * 3 // 4 if line.kind == "windows" else line.head_dim
    image = BLOCKS * tokens - (tokens // 2 if ragged else 0)
    # As a fused projection leaves them.
    q, k, v = made(BATCH, prefix + image, 3, HEADS, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    token, slot = made(1, 1, BLOCKS, tokens, dtype=torch.int64), made(1, 1, image, dtype=torch.int64)
    index = made(BATCH, HEADS if ragged else 1, BLOCKS, TOPK, dtype=torch.int64)
    if line.kind == "windows" or line.direction == "window_gradient":
        index = None
    key_mask = made(BATCH, 1, prefix + image, dtype=torch.bool) if ragged else None
    grad_total = made(BATCH, HEADS, image) if prefix else None
    bias = None
    if line.bias:
        columns = prefix + (1 if index is None else TOPK) * tokens
        bias = made(1, HEADS, BLOCKS, tokens, columns, dtype=torch.float32 if prefix else dtype)
    tables = BlockTables(token, slot, token, slot, index, key_mask, bias, prefix, [ragged] * 2, 0.125)
    with multiplying(line.numbers):
        first = forward_of(q, k, v, tables, line.device_class)
        if line.direction == "forward":
            return [first.launch]
        grad, needs = torch.empty_like(first.out), [True, True, True, line.bias]
        given: tuple[Tensor | None, ...] = (grad, grad_total, first.out, first.total, first.peak, q, k, v)
        found = backward_of(*given, tables, needs, line.device_class).launches  # type: ignore[arg-type]
    return [one for one in found if _belongs(one.kernel.__name__, line)]


def needs(line: Line) -> list[Needs]:
    """Compiles the kernels of a line."""
    return needs_of(line.device_class, [(one, _multiplied(line, one)) for one in launches(line)])


def fingerprint() -> str:
    """A number that changes with the kernels, how they are started, and the table, but not with comments."""
    return fingerprint_of(Path(__file__).parent, PATH)


def _kinds(direction: str, numbers: Numbers, tile: int, width: int, bias: bool) -> Iterator[Kind]:
    """The kinds of calls that a line is compiled for."""
    tokens, widest = WINDOW[dtype_of(numbers).itemsize]
    one_program = tile <= tokens and width <= widest
    if direction == "window_gradient" and not one_program:
        return
    half, small = dtype_of(numbers).itemsize == 2, direction == "window_gradient"
    walks = direction in ("forward", "query_gradient")
    yield "ragged"
    # Elsewhere, and beside a prefix, whole tiles have no more columns than a list of keys has, which takes more
    # registers: one tile tells. A prefix, which keys' gradients do not depend on, is walked over in addition.
    if (half and not bias) or small or (tile == ONE_TILE and not walks):
        yield "whole"
    if tile == ONE_TILE and walks:
        yield "prefix"
    if small:
        windows = not bias
    else:
        windows = half and tile in ODD[0] and width in ODD[1][: 1 if bias else None]
        windows &= direction == "forward" or not one_program
    if windows:
        yield "windows"


def _belongs(kernel: str, line: Line) -> bool:
    """Whether a kernel is a line's, and not another's that it is equal to."""
    if kernel not in KERNELS[line.direction]:
        return False
    if kernel == "blocks_bias_gradient":
        return line.kind in ("ragged", "windows")
    if kernel == "blocks_key_parts":
        return line.kind == "ragged" and not line.bias
    # Prefixes are short: they take the smallest tiles.
    return kernel != "blocks_prefix_gradient" or line.tile == REGION_SIZES[0]


def _multiplied(line: Line, launch: Launch) -> int:
    """Rows of the result that tensor cores are to multiply; float32 itself only those of AMD do."""
    if launch.kernel.__name__ in WITHOUT_PRODUCTS or (line.numbers == "float32" and line.device_class != "gfx942"):
        return 0
    return int(launch.constants["BLOCK_N" if line.direction == "key_gradient" else "BLOCK_M"] or 0)
