"""Grid: how the tokens of an image, a sequence or a video lie in one row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from attnkit.arguments import NamedArguments, is_count
from attnkit.errors import ShapeError, shown

Sizes: TypeAlias = "int | tuple[int, ...] | list[int]"


@dataclass(frozen=True, init=False, repr=False)
class Grid(metaclass=NamedArguments):
    """Token order: `prefix` tokens (CLS, registers) first, then the grid's tokens row-major.

    Args:
        *sizes: length of each axis in tokens, all >= 1. `Grid(14, 14)` is an image of height 14 and width 14,
            `Grid(196)` a sequence, `Grid(8, 14, 14)` a video.
        prefix: number of tokens before the grid's own, >= 0.
        height: the last axis but one, as a keyword instead of a position.
        width: the last axis, as a keyword instead of a position.

    Raises:
        ShapeError: for a size below 1, a negative prefix, or anything that is not an integer.
    """

    _refusal = ShapeError

    sizes: tuple[int, ...]
    prefix: int

    def __init__(self, *sizes: int, prefix: int = 0, height: int | None = None, width: int | None = None) -> None:
        if height is not None:
            sizes = (*sizes, height)
        if width is not None:
            sizes = (*sizes, width)
        if not sizes or not all(is_count(size, 1) for size in sizes):
            raise ShapeError(f"Grid needs one or more sizes, each an integer >= 1 token, but got {shown(sizes)}")
        if not is_count(prefix):
            raise ShapeError(f"Grid(prefix=...) is a number of tokens, an integer >= 0, but got {shown(prefix)}")
        object.__setattr__(self, "sizes", tuple(sizes))
        object.__setattr__(self, "prefix", prefix)

    def __repr__(self) -> str:
        tail = f", prefix={self.prefix}" if self.prefix else ""
        return f"Grid({', '.join(map(str, self.sizes))}{tail})"

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.sizes)

    @property
    def height(self) -> int:
        """Length of the last axis but one in tokens; 1 for a sequence."""
        return self.sizes[-2] if self.ndim > 1 else 1

    @property
    def width(self) -> int:
        """Length of the last axis in tokens."""
        return self.sizes[-1]

    @property
    def image_tokens(self) -> int:
        """Number of tokens on the grid, without the prefix."""
        return math.prod(self.sizes)

    @property
    def tokens(self) -> int:
        """Number of all tokens, N = prefix + image tokens."""
        return self.prefix + self.image_tokens

    def strided(self, stride: Sizes) -> Grid:
        """The grid of every `stride`-th token along each axis, from the first on: sizes are ceil(size / stride)."""
        if _is_one(stride):
            return self
        steps = self.per_axis(stride, "stride")
        return Grid(*(-(-size // step) for size, step in zip(self.sizes, steps, strict=True)), prefix=self.prefix)

    def refined(self, scale: Sizes) -> Grid:
        """The grid with `scale` places for every token along each axis."""
        if _is_one(scale):
            return self
        times = self.per_axis(scale, "scale")
        return Grid(*(size * one for size, one in zip(self.sizes, times, strict=True)), prefix=self.prefix)

    def coords(self, device: torch.device | str | None = None) -> Tensor:
        """Position of every image token, row-major, int64 of shape (image_tokens, ndim)."""
        axes = [torch.arange(size, device=device) for size in self.sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, self.ndim)

    def per_axis(self, value: Sizes, what: str) -> tuple[int, ...]:
        """Spreads one number over all axes, or checks that there is one per axis.

        Args:
            value: an integer >= 1, or one per axis.
            what: the name of the number in the error message.

        Raises:
            ShapeError: for another length, or a number below 1.
        """
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * self.ndim
        if len(values) != self.ndim or not all(is_count(one, 1) for one in values):
            raise ShapeError(f"{what} is an integer >= 1 or one per axis of {self}, but got {shown(value)}")
        return values

    def check_tokens(self, tokens: int, what: str = "x") -> None:
        """Raises `ShapeError` unless `tokens` is the number of tokens of this grid."""
        if tokens != self.tokens:
            prefix = f"{self.prefix} prefix + " if self.prefix else ""
            raise ShapeError(
                f"{what} has {tokens} tokens but {self} holds {prefix}{'*'.join(map(str, self.sizes))} = {self.tokens}"
            )


def _is_one(value: Sizes) -> bool:
    # True counts as 1 too, and is refused.
    return type(value) is int and value == 1


# To torch.export a grid is a constant without tensors in it, which is saved and loaded with the program.
register_pytree_node(
    Grid,
    lambda grid: ([], (*grid.sizes, grid.prefix)),
    lambda _, numbers: Grid(*numbers[:-1], prefix=numbers[-1]),
    serialized_type_name="attnkit.Grid",
    from_dumpable_context=tuple,
    to_dumpable_context=list,
    flatten_with_keys_fn=lambda grid: ([], (*grid.sizes, grid.prefix)),
)
torch.serialization.add_safe_globals([Grid])
