"""Configurations: tiles, warps and stages of the kernels of blocks, kept as a table and chosen by a rule.

`configs.json` holds them by class of device, direction, bits of a number, region size and head dim. Products of float32
in TF32, which tensor cores do, and a bias, which is read in tiles too, have lines of their own. A class has lines only
where it departs from `default`. Nothing is timed at run time; `attnkit bench --tune` times candidates and rewrites the
lines of its device.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from attnkit.errors import BackendError

Direction: TypeAlias = Literal["forward", "query_gradient", "key_gradient"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "query_gradient", "key_gradient")
DEVICE_CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory a program may have. GPUs of the class sm_80 have 163 KiB or, the smaller ones, 99.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Tokens of a tile of rows that regions of any size are cut into, and the widths that head dims are padded to.
REGION_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 128, 256)
NUMBERS = ("16 bit", "32 bit", "tf32", "16 bit and bias", "32 bit and bias", "tf32 and bias")
# Direction, one of `NUMBERS`, region size and head dim, as the table names them.
Spot: TypeAlias = "tuple[Direction, str, str, str]"
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


# Read at import: the first call may already be one that is being compiled, where nothing can be read.
_TABLE: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))


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
        device_class: as `device_class` gives it.
        bias: whether the logits get a bias.
        tf32: whether products of float32 numbers are rounded to TF32.

    Raises:
        BackendError: for a wider head or another dtype.
    """
    spot = spot_of(direction, region_size, head_dim, dtype, bias, tf32)
    found = own(device_class, spot) or own("default", spot)
    assert found is not None, spot
    return found


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


def own(device_class: str, spot: Spot) -> Config | None:
    """The line that a class of devices has for itself, None where it has `default`'s."""
    table = _TABLE.get(device_class, {})
    for name in spot:
        table = table.get(name, {})
    return Config(*table) if table else None


def put(device_class: str, spot: Spot, config: Config | None) -> None:
    """Gives a class of devices a line of its own in this process's table, or with None takes it away."""
    path = [_TABLE]
    for name in (device_class, *spot[:-1]):
        path.append(path[-1].setdefault(name, {}))
    if config is not None:
        path[-1][spot[-1]] = list(config)
    else:
        path[-1].pop(spot[-1], None)
        for table, name in reversed([*zip(path, (device_class, *spot), strict=True)]):
            if not table.get(name, True):
                del table[name]
    configuration.cache_clear()


def written() -> str:
    """This process's table as the text of `configs.json`, a region size a line."""
    return _written(_TABLE, 0) + "\n"


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


def device_class(device: torch.device) -> str:
    """The class of a GPU: `"sm_90"` (Hopper), `"sm_100"` (Blackwell of data centres), `"gfx942"` (any of AMD's), and
    `"sm_80"` for Ampere and for all others of NVIDIA's, whose tiles fit the 99 KiB of shared memory of the small ones.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _written(table: dict[str, Any], indent: int) -> str:
    if all(isinstance(one, list) for one in table.values()):
        return json.dumps(table)
    parts = [f"{' ' * (indent + 2)}{json.dumps(name)}: {_written(one, indent + 2)}" for name, one in table.items()]
    return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
