"""Configurations: tiles, warps and stages of the kernels of blocks, kept as a table and chosen by a rule.

`configs.json` holds them by class of device, direction, bits of a number, region size and head dim. Products of float32
in TF32, which tensor cores do, and a bias, which is read in tiles too, have lines of their own. A class has lines only
where it departs from `default`. Nothing is timed at run time; `attnkit bench --tune` times candidates and rewrites the
lines of its device.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from attnkit.errors import BackendError
from attnkit.kernels.triton.table import Table

Direction: TypeAlias = Literal["forward", "query_gradient", "key_gradient"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "query_gradient", "key_gradient")
# Tokens of a tile of rows that regions of any size are cut into, and the widths that head dims are padded to.
REGION_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 128, 256)
NUMBERS = ("16 bit", "32 bit", "tf32", "16 bit and bias", "32 bit and bias", "tf32 and bias")
# The kernels that can make products over channels a few channels at a time, and from which width on they do so on
# NVIDIA's GPUs where products of float32 are exact.
Stepping: TypeAlias = Literal["query_gradient", "bias_gradient", "key_gradient"]
STEPS_FROM: dict[Stepping, int] = {"query_gradient": 256, "bias_gradient": 64}
# Direction, one of `NUMBERS`, region size and head dim, as the table names them.
Spot: TypeAlias = "tuple[Direction, str, str, str]"
# Tokens of a window, and widths, up to which one program makes all its gradients without running out of registers, by
# bytes of a number.
WINDOW = {2: (64, 32), 4: (16, 16)}
PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How a kernel is cut and started.

    Attributes:
        rows: tokens whose result a program makes: queries, or keys for the gradients of keys and values.
        columns: tokens of the other side that it visits at once.
        warps: warps a program has.
        stages: loads of how many visits are under way at once.
    """

    rows: int
    columns: int
    warps: int
    stages: int


_TABLE = Table(PATH)


@functools.cache
def configuration(
    direction: Direction,
    region_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device_class: str,
    bias: bool = False,
    tf32: bool = False,
) -> Config:
    """The configuration of a kernel.

    Args:
        direction: which result: `"forward"`, `"query_gradient"`, or `"key_gradient"` for those of keys and values.
        region_size: tokens of a region whose result is made (queries, or keys), >= 1.
        head_dim: the wider of the widths of keys and values, 1..256.
        dtype: dtype of q, k and v, of 16 or 32 bits.
        device_class: as `attnkit.kernels.triton.devices.device_class` gives it.
        bias: whether the logits get a bias.
        tf32: whether products of float32 numbers are rounded to TF32.

    Raises:
        BackendError: for a wider head or another dtype.
    """
    spot = spot_of(direction, region_size, head_dim, dtype, bias, tf32)
    return Config(*_TABLE.line(device_class, spot))


def depth(
    kernel: Stepping, head_dim: int, dtype: torch.dtype, device_class: str, bias: bool = False, tf32: bool = False
) -> int | None:
    """How many channels a kernel multiplies at a time in its products over channels; None for all of them.

    NVIDIA's tensor cores do not make exact products of float32. Threads do, which hold whole rows of both sides where
    all channels are multiplied at once: more than there are registers for. In TF32 the gradients of the widest keys
    beside a bias run out of them too, where they are kept to the shared memory of small GPUs.

    Args:
        kernel: one of those that can.
        head_dim: the wider of the widths of keys and values, 1..256.
        dtype: dtype of q, k and v, of 16 or 32 bits.
        device_class: as `attnkit.kernels.triton.devices.device_class` gives it.
        bias: whether the logits get a bias.
        tf32: whether products of float32 numbers are rounded to TF32.
    """
    width = padded_dim(head_dim)
    if device_class == "gfx942" or dtype.itemsize != 4:
        return None
    if tf32:
        crowded = kernel == "key_gradient" and bias and device_class == "sm_80"
        return 128 if crowded and width == HEAD_DIMS[-1] else None
    return 32 if width >= STEPS_FROM.get(kernel, HEAD_DIMS[-1] + 1) else None


def spot_of(
    direction: Direction,
    region_size: int,
    head_dim: int,
    dtype: torch.dtype,
    bias: bool = False,
    tf32: bool = False,
) -> Spot:
    """Where the table has the configuration of a kernel; arguments as for `configuration`."""
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise BackendError(f"the Triton kernels have tiles for head dims 1 to {HEAD_DIMS[-1]}, not {head_dim}")
    if dtype.itemsize not in (2, 4):
        raise BackendError(f"the Triton kernels have tiles for dtypes of 16 and 32 bits, not {dtype}")
    numbers = "tf32" if tf32 and dtype.itemsize == 4 else f"{8 * dtype.itemsize} bit"
    return direction, numbers + " and bias" * bias, str(tile_of(region_size)), str(padded_dim(head_dim))


def tile_of(region_size: int) -> int:
    """The line of the table for a region: the smallest that holds it whole; for more than 64 tokens, 128 where tiles
    of 128 round up no further than tiles of 64 would."""
    for size in REGION_SIZES[:-1]:
        if region_size <= size:
            return size
    return 128 if -(-region_size // 64) % 2 == 0 else 64


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile has for a head dim."""
    return next(width for width in HEAD_DIMS if head_dim <= width)
