"""Sweep: all kernels of blocks that the table of configurations can start, compiled for GPUs that are not there."""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.blocks.configs import DIRECTIONS, HEAD_DIMS, PATH, REGION_SIZES, Direction
from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED
from attnkit.kernels.triton.launch import Launch

if TYPE_CHECKING:
    from attnkit.kernels.triton.ahead import Compiled

# How numbers are multiplied: those of 16 bits, and float32 exactly or, where PyTorch is allowed to, as tf32.
Numbers: TypeAlias = Literal["bfloat16", "float16", "float32", "tf32"]
NUMBERS: tuple[Numbers, ...] = ("bfloat16", "float16", "float32", "tf32")

# Which kernels take their configuration from which direction.
KERNELS: dict[Direction, tuple[str, ...]] = {
    "forward": ("blocks_forward",),
    "query_gradient": ("blocks_query_gradient", "blocks_bias_gradient"),
    "key_gradient": ("blocks_key_gradient", "blocks_key_parts", "blocks_prefix_gradient"),
}
WITHOUT_PRODUCTS = ("blocks_key_parts",)

# NVIDIA's assembler puts a few bytes aside although registers are left, where that lets one more program run at a time.
TRIFLE, MOST_REGISTERS = 16, 255
# Tokens of regions that do not fill their tiles.
RAGGED = {16: 9, 32: 25, 64: 49, 128: 100}
BATCH, HEADS, BLOCKS, TOPK = 2, 4, 64, 4


class Line(NamedTuple):
    """A line of the table, for one class of devices and way to multiply.

    Attributes:
        device_class: one of `DEVICE_CLASSES`.
        direction: which result.
        numbers: one of `NUMBERS`.
        tile: one of `REGION_SIZES`.
        head_dim: one of `HEAD_DIMS`.
        ragged: whether regions leave gaps in their tiles, beside prefix tokens, masked keys, a gradient of the lse and
            an index for each head; else none of these.
        bias: whether there is one.
    """

    device_class: str
    direction: Direction
    numbers: Numbers
    tile: int
    head_dim: int
    ragged: bool
    bias: bool


class Needs(NamedTuple):
    """What a kernel of a line needs, and what is wrong with that."""

    line: Line
    launch: Launch
    compiled: Compiled
    faults: tuple[str, ...]


def lines(devices: tuple[str, ...] = DEVICE_CLASSES, numbers: tuple[Numbers, ...] = NUMBERS) -> list[Line]:
    """All lines of the table for some classes of devices and ways to multiply, each for the four kinds of calls.

    The half precisions share their lines, and of float16 whole tiles without a bias are taken only.
    """
    shapes = itertools.product(REGION_SIZES, HEAD_DIMS, (False, True), (False, True))
    return [
        Line(device, direction, way, *shape)
        for device, direction, way, shape in itertools.product(devices, DIRECTIONS, numbers, list(shapes))
        if way != "float16" or not any(shape[2:])
    ]


def launches(line: Line) -> list[Launch]:
    """The launches that take their configuration from a line, from tensors without data."""
    # Here and below, so that lines and fingerprint need no Triton.
    from attnkit.kernels.triton.blocks.launches import backward_of, forward_of

    dtype = torch.float32 if line.numbers == "tf32" else getattr(torch, line.numbers)
    made = partial(torch.empty, device="meta")
    tokens, prefix = (RAGGED[line.tile], 1) if line.ragged else (line.tile, 0)
    image = BLOCKS * tokens - (tokens // 2 if line.ragged else 0)
    # As a fused projection leaves them.
    q, k, v = made(BATCH, prefix + image, 3, HEADS, line.head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    token, slot = made(1, 1, BLOCKS, tokens, dtype=torch.int64), made(1, 1, image, dtype=torch.int64)
    index = made(BATCH, HEADS if line.ragged else 1, BLOCKS, TOPK, dtype=torch.int64)
    key_mask = made(BATCH, 1, prefix + image, dtype=torch.bool) if line.ragged else None
    grad_lse = made(BATCH, HEADS, image) if line.ragged else None
    bias = made(1, HEADS, BLOCKS, tokens, prefix + TOPK * tokens, dtype=dtype) if line.bias else None
    tables = BlockTables(token, slot, token, slot, index, key_mask, bias, prefix, [line.ragged] * 2, 0.125)
    with _multiplying(line.numbers):
        first = forward_of(q, k, v, tables, line.device_class)
        if line.direction == "forward":
            found = [first.launch]
        else:
            grad, needs = torch.empty_like(first.out), [True, True, True, line.bias]
            given: tuple[Tensor | None, ...] = (grad, grad_lse, first.out, first.lse, q, k, v)
            found = backward_of(*given, tables, needs, line.device_class).launches  # type: ignore[arg-type]
    return [one for one in found if one.kernel.__name__ in KERNELS[line.direction]]


def needs(line: Line) -> list[Needs]:
    """Compiles the kernels of a line."""
    from attnkit.kernels.triton.ahead import compiled

    found = []
    for launch in launches(line):
        one = compiled(launch, line.device_class)
        found.append(Needs(line, launch, one, tuple(_faults(line, launch, one))))
    return found


def fingerprint() -> str:
    """A number that changes with the kernels and the table, but not with comments and docstrings."""
    digest = hashlib.sha256(PATH.read_bytes())
    own = Path(__file__).parent
    for path in sorted([*own.glob("*.py"), *own.parent.glob("*.py")]):
        text = path.read_text(encoding="utf-8")
        if "\n@triton.jit" in text:
            digest.update(ast.dump(_without_docstrings(ast.parse(text))).encode())
    return digest.hexdigest()[:16]


def _faults(line: Line, launch: Launch, found: Compiled) -> Iterator[str]:
    if found.spilled > TRIFLE or (found.spilled and found.registers >= MOST_REGISTERS):
        yield f"{found.spilled} bytes of a thread do not fit into registers"
    limit = SHARED[line.device_class]
    if found.shared > limit:
        yield f"{found.shared} bytes of shared memory where there are {limit}"
    if launch.kernel.__name__ in WITHOUT_PRODUCTS or (line.numbers == "float32" and line.device_class != "gfx942"):
        # float32 itself is multiplied by tensor cores of AMD only.
        return
    # Those of the result; a group of four warps multiplies 64 of them.
    rows = int(launch.constants["BLOCK_N" if line.direction == "key_gradient" else "BLOCK_M"] or 0)
    wide = rows >= 64 and launch.warps >= 4
    wanted = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(line.device_class, "") if wide else ""
    if wanted and wanted not in found.instructions:
        yield f"tiles of {rows} rows do without {wanted}"
    if not found.instructions:
        yield "it does without tensor cores"


@contextmanager
def _multiplying(numbers: Numbers) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if numbers == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
