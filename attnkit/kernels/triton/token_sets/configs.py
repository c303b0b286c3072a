"""Configurations: tiles, warps and stages of the kernels of token sets, kept as a table and chosen by a rule.

`configs.json` holds them by class of device, direction, bits of a number and head dim. A class has lines only where it
departs from `default`. Nothing is timed at run time.
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
HEAD_DIMS = (16, 32, 64, 128, 256)
NUMBERS = ("16 bit", "32 bit", "tf32", "16 bit and bias", "32 bit and bias", "tf32 and bias")
# Direction, one of `NUMBERS` and head dim, as the table names them.
Spot: TypeAlias = "tuple[Direction, str, str]"
PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How a kernel is cut and started.

    Attributes:
        rows: tokens whose result a program makes, 16, 32 or 64: queries, or keys for the gradients of keys and values.
        columns: tokens of its list that it visits at once.
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
    head_dim: int,
    dtype: torch.dtype,
    device_class: str,
    bias: bool = False,
    tf32: bool = False,
) -> Config:
    """The configuration of a kernel.

    Args:
        direction: which result: `"forward"`, `"query_gradient"`, or `"key_gradient"` for those of keys and values.
        head_dim: the wider of the widths of keys and values, 1..256.
        dtype: dtype of q, k and v, of 16 or 32 bits.
        device_class: as `attnkit.kernels.triton.devices.device_class` gives it.
        bias: whether the logits get a bias.
        tf32: whether products of float32 numbers are rounded to TF32.

    Raises:
        BackendError: for a wider head or another dtype.
    """
    return Config(*_TABLE.line(device_class, spot_of(direction, head_dim, dtype, bias, tf32)))


def spot_of(direction: Direction, head_dim: int, dtype: torch.dtype, bias: bool = False, tf32: bool = False) -> Spot:
    """Where the table has the configuration of a kernel; arguments as for `configuration`."""
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise BackendError(f"the Triton kernels have tiles for head dims 1 to {HEAD_DIMS[-1]}, not {head_dim}")
    if dtype.itemsize not in (2, 4):
        raise BackendError(f"the Triton kernels have tiles for dtypes of 16 and 32 bits, not {dtype}")
    numbers = "tf32" if tf32 and dtype.itemsize == 4 else f"{8 * dtype.itemsize} bit"
    return direction, numbers + " and bias" * bias, str(padded_dim(head_dim))


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile has for a head dim."""
    return next(width for width in HEAD_DIMS if head_dim <= width)
