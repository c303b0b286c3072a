"""Configurations: patches, warps and stages of the kernels of stencils, kept as a table and chosen by a rule.

`configs.json` holds them by class of device, direction, bits of a number, window size and head dim. Products of float32
in TF32, which tensor cores do, and tables of bias and gain, whose addresses take registers, have lines of their own. A
class has lines only where it departs from `default`. Nothing is timed at run time, and these lines were not timed yet.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from attnkit.errors import BackendError
from attnkit.kernels.triton.table import Table

Direction: TypeAlias = Literal["forward", "query_gradient", "key_gradient", "learned_forward", "learned_gradient"]
DIRECTIONS: tuple[Direction, ...] = (
    "forward",
    "query_gradient",
    "key_gradient",
    "learned_forward",
    "learned_gradient",
)
# Axes that kernels have addresses for.
AXES = 3
# Places of a window's longest side, up to which a line holds; the last holds for all others.
KERNELS = (7, 15)
# The widths that head dims are padded to.
HEAD_DIMS = (16, 32, 64, 128, 256)
NUMBERS = ("16 bit", "32 bit", "tf32", "16 bit and tables", "32 bit and tables", "tf32 and tables")
# Direction, one of `NUMBERS`, window size and head dim, as the table names them.
Spot: TypeAlias = "tuple[Direction, str, str, str]"
PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How a kernel is cut and started.

    Attributes:
        rows: tokens of a patch whose result a program makes: queries, or keys for their gradients.
        columns: tokens of the other side that it visits at once; for learned queries, numbers of a token's heads that
            it has.
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
    kernel: int,
    head_dim: int,
    dtype: torch.dtype,
    device_class: str,
    tables: bool = False,
    tf32: bool = False,
) -> Config:
    """The configuration of a kernel.

    Args:
        direction: which result; for queries that are all the same, those that begin with `learned`.
        kernel: places of a window's longest side, >= 1.
        head_dim: the wider of the widths of keys and values, 1..256.
        dtype: the widest of q, k and v, or of learned queries that of v, of 16 or 32 bits.
        device_class: as `attnkit.kernels.triton.devices.device_class` gives it.
        tables: whether there is a bias or a gain.
        tf32: whether products of float32 numbers are rounded to TF32.

    Raises:
        BackendError: for a wider head or another dtype.
    """
    return Config(*_TABLE.line(device_class, spot_of(direction, kernel, head_dim, dtype, tables, tf32)))


def spot_of(
    direction: Direction, kernel: int, head_dim: int, dtype: torch.dtype, tables: bool = False, tf32: bool = False
) -> Spot:
    """Where the table has the configuration of a kernel; arguments as for `configuration`."""
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise BackendError(f"the Triton kernels have tiles for head dims 1 to {HEAD_DIMS[-1]}, not {head_dim}")
    if dtype.itemsize not in (2, 4):
        raise BackendError(f"the Triton kernels have tiles for dtypes of 16 and 32 bits, not {dtype}")
    numbers = f"{8 * dtype.itemsize} bit"
    if direction not in ("learned_forward", "learned_gradient"):
        numbers = ("tf32" if tf32 and dtype.itemsize == 4 else numbers) + " and tables" * tables
    side = next((size for size in KERNELS if kernel <= size), KERNELS[-1])
    return direction, numbers, str(side), str(padded_dim(head_dim))


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile of tensor cores has for a head dim."""
    return next(width for width in HEAD_DIMS if head_dim <= width)
