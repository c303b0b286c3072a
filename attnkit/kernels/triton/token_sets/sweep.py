"""Sweep: all kernels of token sets that the table of configurations can start, compiled for GPUs that are not there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton.devices import DEVICE_CLASSES
from attnkit.kernels.triton.launch import Launch
from attnkit.kernels.triton.sweeping import Needs, Numbers, dtype_of, fingerprint_of, multiplying, needs_of
from attnkit.kernels.triton.token_sets.configs import DIRECTIONS, HEAD_DIMS, PATH, Direction, configuration

TITLE = "Token sets and masks"
TABLES = {
    "lists": "Lists of tiles",
    "forward": "Forward",
    "query_gradient": "Gradient of queries",
    "key_gradient": "Gradients of keys and values",
}
ROWS = ("numbers",)
COLUMNS = {str(width): f"heads of {width}" for width in HEAD_DIMS}

# Lists take no configuration of their own but the rows of the kernels that walk over them.
Shown: TypeAlias = Literal[Direction, "lists"]
AND_BIAS = " and bias"
NUMBERS: tuple[Numbers, ...] = ("bfloat16", "float32", "tf32")

# Which kernels take their configuration from which direction.
KERNELS: dict[Shown, tuple[str, ...]] = {
    "lists": ("token_set_marks", "token_set_unions"),
    "forward": ("token_sets_forward",),
    "query_gradient": ("token_sets_query_gradient", "token_sets_bias_gradient"),
    "key_gradient": ("token_sets_key_gradient",),
}
BATCH, HEADS, TOKENS, SLOTS = 2, 4, 196, 24


class Line(NamedTuple):
    """A line of the table, for one class of devices, way to multiply and kind of calls.

    Attributes:
        device_class: one of `DEVICE_CLASSES`.
        direction: which result, or `"lists"`: of keys and of queries.
        numbers: one of `Numbers`.
        head_dim: one of `HEAD_DIMS`.
        odd: whether heads are narrower than their tiles, lists are of int32, in an order of queries, beside a token
            that all see, hidden keys and a gradient of the lse; else a mask and none of these.
        bias: whether there is one, with a number for each pair.
        summed: whether it has one for each query instead, or for each key, whichever the direction adds up.
    """

    device_class: str
    direction: Shown
    numbers: Numbers
    head_dim: int
    odd: bool
    bias: bool
    summed: bool = False


def lines(devices: Sequence[str] = DEVICE_CLASSES, numbers: Sequence[Numbers] = NUMBERS) -> list[Line]:
    """The lines of the table for some classes of devices and ways to multiply. float16 shares bfloat16's lines."""
    lists = itertools.product(devices, ("lists",), numbers, HEAD_DIMS[:1], (False, True), (False,))
    spots = itertools.product(devices, DIRECTIONS, numbers, HEAD_DIMS, (False, True), (False, True))
    # The kind that needs more of all, and the other of what models have most.
    common = ("bfloat16", (HEAD_DIMS[0], 32, 64))
    every = (Line(*spot) for spot in (*lists, *spots))
    found = [line for line in every if line.odd or (line.numbers == common[0] and line.head_dim in common[1])]
    summed = (one for one in found if one.bias and one.direction != "forward")
    return [*found, *(one._replace(summed=True) for one in summed)]


def name(line: Line) -> str:
    """The line's cell in the table, such as `"sm_90/forward/bfloat16 and bias/32"`."""
    return "/".join((line.device_class, line.direction, line.numbers + AND_BIAS * line.bias, str(line.head_dim)))


def cut(line: Line) -> str:
    """Rows x columns of a tile, warps and stages."""
    if line.direction == "lists":
        launch = launches(line)[-1]
        return f"{launch.constants['BLOCK_M']}x{launch.constants['BLOCK_N']}, {launch.warps} w"
    dtype, rounded = dtype_of(line.numbers), line.numbers == "tf32"
    found = configuration(line.direction, line.head_dim, dtype, line.device_class, line.bias, rounded)
    return f"{found.rows}x{found.columns}, {found.warps} w, {found.stages} s"


def launches(line: Line) -> list[Launch]:
    """The launches that take their configuration from a line, from tensors without data."""
    # Here and below, so that lines and fingerprint need no Triton.
    from attnkit.kernels.triton.token_sets.launches import backward_of, forward_of

    dtype, made = dtype_of(line.numbers), partial(torch.empty, device="meta")
    prefix, width = (1, line.head_dim * 3 // 4) if line.odd else (0, line.head_dim)
    tokens = prefix + TOKENS
    # As a fused projection leaves them.
    q, k, v = made(BATCH, tokens, 3, HEADS, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    table = made(BATCH, HEADS, tokens, tokens, dtype=torch.bool)
    if line.odd:
        table = made(BATCH, HEADS, TOKENS, SLOTS, dtype=torch.int32)
    key_mask = made(BATCH, 1, tokens, dtype=torch.bool) if line.odd else None
    grad_total = made(BATCH, HEADS, tokens) if line.odd else None
    bias = made(1, HEADS, *_numbers_of(line, tokens), dtype=torch.float32 if line.odd else dtype) if line.bias else None
    order = made(1, HEADS, TOKENS, dtype=torch.int32) if line.odd else None
    tables = SetTables(table, key_mask, bias, prefix, prefix, 0.125, order)
    with multiplying(line.numbers):
        first = forward_of(q, k, v, tables, line.device_class)
        grad, needs = torch.empty_like(first.out), [True, True, True, line.bias]
        given: tuple[Tensor | None, ...] = (grad, grad_total, first.out, first.total, first.peak, q, k, v)
        steps = first.steps
        if line.direction != "forward":
            steps = backward_of(*given, tables, needs, line.device_class).steps  # type: ignore[arg-type]
    return list(_once(one for one in steps if isinstance(one, Launch) and _name(one) in KERNELS[line.direction]))


def _numbers_of(line: Line, tokens: int) -> tuple[int, int]:
    """Rows and columns of a bias."""
    if not line.summed:
        return tokens, tokens
    return (1, tokens) if line.direction == "key_gradient" else (tokens, 1)


def needs(line: Line) -> list[Needs]:
    """Compiles the kernels of a line."""
    return needs_of(line.device_class, [(one, _multiplied(line, one)) for one in launches(line)])


def fingerprint() -> str:
    """A number that changes with the kernels, how they are started, and the table, but not with comments."""
    return fingerprint_of(Path(__file__).parent, PATH)


def _once(found: Iterator[Launch]) -> Iterator[Launch]:
    """Launches of the same code once: lists are made in several."""
    met = set()
    for one in found:
        code = (_name(one), *one.constants.items())
        if code not in met:
            met.add(code)
            yield one


def _name(launch: Launch) -> str:
    return launch.kernel.__name__


def _multiplied(line: Line, launch: Launch) -> int:
    """Rows of the result that tensor cores are to multiply; float32 itself only those of AMD do."""
    if line.direction == "lists" or (line.numbers == "float32" and line.device_class != "gfx942"):
        return 0
    return int(launch.constants["BLOCK_M"] or 0)
