"""What a layer is given, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from attnkit.arguments import is_count, name_mistakes
from attnkit.errors import ConfigError, PrimitiveError, ShapeError, shown
from attnkit.grid import Grid
from attnkit.kernels.precision import autocasting
from attnkit.primitives.base import Columns, HeadGroup, HeadOutput, PrimitiveOptions, label_of, what


def check_keywords(layer: str, given: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Raises `ConfigError` for keywords that a layer does not take, naming the nearest ones.

    Args:
        layer: name of the layer's class.
        given: keywords of the call.
        known: keywords the layer takes.
        hint: end of the message.
    """
    found, _ = name_mistakes(given, list(known), {}, layer)
    if found:
        raise ConfigError("; ".join(found) + hint)


def check_widths(layer: str, dim: int, **others: int | None) -> None:
    """Raises `ConfigError` unless `dim` and every other width that is given count channels."""
    for name, size in {"dim": dim, **others}.items():
        if (size is not None or name == "dim") and not is_count(size, 1):
            raise ConfigError(f"{layer}({name}=...) is a number of channels, an integer >= 1, but got {shown(size)}")


def check_flags(layer: str, **flags: bool) -> None:
    """Raises `ConfigError` for a flag that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"{layer}({name}=...) must be True or False, but got {shown(flag)}")


def check_tensor(x: object, name: str = "x") -> None:
    """Raises `ShapeError` for anything but a tensor."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} must be a tensor, but got {type(x).__name__}")


def tokens_of_map(layer: str, dim: int, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Grid]:
    """The tokens (B, N, C) of a map (B, ..., C) and their grid.

    Args:
        layer: name of the layer's class.
        dim: the layer's width.
        x: the map.
        token_mask: must be None.

    Raises:
        ShapeError: for anything but a map of that width in which at least one token lies.
    """
    check_tensor(x)
    shape = tuple(x.shape)
    if x.ndim < 4:
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        sizes = f"{side}, {side}" if side and side**2 == shape[1] else "height, width"
        raise ShapeError(
            f"{layer} takes a map (B, H, W, C), or tokens (B, N, C) with their grid, but got {shape} without one: "
            f"pass it as in `layer(x, attnkit.Grid({sizes}))`"
        )
    if token_mask is not None:
        raise ShapeError(f"token_mask goes with tokens (B, N, C) and their grid, but x is a map {shape}")
    if shape[-1] != dim:
        order = ", ".join(map(str, (0, *range(2, x.ndim), 1)))
        hint = f"; maps are channels last (B, H, W, C): use x.permute({order})" if shape[1] == dim else ""
        raise ShapeError(f"{layer} of dim={dim} takes a map (B, H, W, {dim}), but got {shape}{hint}")
    if 0 in shape[1:-1]:
        raise ShapeError(f"{layer} got an empty map {shape}")
    return x.flatten(1, -2), Grid(*shape[1:-1])


def check_tokens(
    layer: str,
    dim: int,
    weight: Tensor,
    x: Tensor,
    grid: Grid,
    token_mask: Tensor | None,
    draw: Tensor | None,
    places: Tensor | None = None,
) -> None:
    """Raises `ShapeError` unless tokens fit a layer in shape, dtype and device, and so do their grid, mask and draw.

    Args:
        layer: name of the layer's class.
        dim: the layer's width.
        weight: one of its parameters.
        x: (B, N, C).
        grid: how the tokens lie.
        token_mask: bool (B, N), or None.
        draw: int64 scalar, or None.
        places: int64 (B, N), or None; with them there may be fewer tokens than the grid has.
    """
    check_tensor(x)
    shape = tuple(x.shape)
    if not isinstance(grid, Grid):
        raise ShapeError(f"{layer} needs the tokens' grid, such as Grid(14, 14), but got {shown(grid)}")
    if x.ndim > 3:
        raise ShapeError(f"a map takes no grid: {layer} got {shape} with {grid}; leave the grid out")
    if x.ndim != 3 or shape[-1] != dim:
        raise ShapeError(f"{layer} of dim={dim} takes tokens (B, N, {dim}), but got {shape}")
    if x.device != weight.device:
        raise ShapeError(f"x is on {x.device} but the weights are on {weight.device}; move one of them")
    if x.dtype != weight.dtype and not (x.is_floating_point() and autocasting(x.device)):
        raise ShapeError(f"x is {x.dtype} but the weights are {weight.dtype}; convert one of them or use autocast")
    if places is None:
        grid.check_tokens(shape[1])
    elif not isinstance(places, Tensor) or places.dtype != torch.int64 or places.shape != x.shape[:2]:
        raise ShapeError(f"places must be int64 (B, N) = {shape[:2]}, but got {shown(places)}")
    elif places.device != x.device or not grid.prefix <= shape[1] <= grid.tokens:
        raise ShapeError(
            f"places are numbers of tokens of {grid}, prefix tokens first, on {x.device}, but got {shown(places)}"
        )
    if token_mask is not None:
        check_tensor(token_mask, "token_mask")
        if token_mask.device != x.device:
            raise ShapeError(f"token_mask is on {token_mask.device} but x is on {x.device}; move one of them")
        if token_mask.dtype != torch.bool or token_mask.shape != x.shape[:2]:
            raise ShapeError(
                f"token_mask must be bool (B, N) = {shape[:2]}, but got {token_mask.dtype} {tuple(token_mask.shape)}"
            )
    if draw is not None and not (isinstance(draw, Tensor) and draw.dtype == torch.int64 and draw.ndim == 0):
        raise ShapeError(f"draw is an int64 scalar tensor, such as mix.next_draw() gives, but got {shown(draw)}")


def check_columns(options: PrimitiveOptions, columns: Columns) -> Columns:
    """Returns what a primitive's `columns` gave, or raises `PrimitiveError` if heads cannot be made of it."""
    widths = (columns.q, columns.k, columns.v) if isinstance(columns, Columns) else ()
    if not widths or not all(isinstance(one, int) and one >= 0 and one % options.heads == 0 for one in widths):
        raise PrimitiveError(
            f"{label_of(options)}: columns() must return Columns of numbers >= 0 that divide into "
            f"{options.heads} heads, but returned {columns!r}"
        )
    return columns


def check_group(options: PrimitiveOptions, group: HeadGroup) -> HeadGroup:
    """Returns what a primitive's `build` gave, or raises `PrimitiveError` if it is no head group."""
    if not isinstance(group, HeadGroup):
        raise PrimitiveError(f"{label_of(options)}: build() must return a HeadGroup, but returned {what(group)}")
    return group


def check_output(options: PrimitiveOptions, output: HeadOutput, shape: tuple[int, ...], grid: Grid) -> HeadOutput:
    """Returns what a head group gave.

    Args:
        options: the group's.
        output: what it gave.
        shape: what its shape must be, (B, heads, N', D).
        grid: what its grid must be.

    Raises:
        PrimitiveError: for anything but a `HeadOutput` of that shape and grid.
    """
    if not isinstance(output, HeadOutput):
        raise PrimitiveError(f"{label_of(options)}: forward() must return a HeadOutput, but returned {what(output)}")
    if not isinstance(output.out, Tensor):
        raise PrimitiveError(
            f"{label_of(options)}: forward() must return HeadOutput(out, grid), but out is {what(output.out)}"
        )
    # Part by part: compilers cannot compare grids whose sizes they do not know.
    if (*output.grid.sizes, output.grid.prefix) != (*grid.sizes, grid.prefix):
        raise PrimitiveError(
            f"{label_of(options)}: forward() returned the grid {output.grid}, "
            f"but output_stride() and output_scale() promise {grid}"
        )
    if output.out.shape != shape:
        raise PrimitiveError(
            f"{label_of(options)}: forward() must return (B, heads, N', D) = {shape}, "
            f"but returned {tuple(output.out.shape)}"
        )
    return output
