"""window: attention inside square windows, plain, shifted (Swin) or spread over the grid (MaxViT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnkit.grid import Grid
from attnkit.layouts import Blocks, RelativeTable
from attnkit.options import among, positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class Window(SoftmaxOptions):
    """Attention inside windows of window x window tokens.

    A window that exceeds the grid covers it; grids that the window does not divide get smaller windows at the edge.

    Args:
        heads: number of heads, >= 1.
        window: tokens per side of a window, >= 1; one number or one per axis.
        partition: `"plain"`; `"shifted"`, moved by half a window so that neighbours across plain borders meet (Swin);
            `"grid"`, the tokens of a window spread evenly over the whole grid (MaxViT).
        relative_bias: learn a bias per head and offset inside the window, as in Swin (not for `"grid"`).
    """

    kind: ClassVar[str] = "window"
    paper: ClassVar[str] = (
        "Liu et al. 2021, Swin Transformer, arXiv 2103.14030; grid: Tu et al. 2022, MaxViT, arXiv 2204.01697"
    )
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j + b[j - i]) v_j, j over the window of i"
    cost: ClassVar[str] = "2 N w^2 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"window": 7},
        {"window": 7, "partition": "shifted"},
        {"window": 7, "partition": "grid"},
    )

    window: int | tuple[int, ...]
    _: KW_ONLY
    partition: Literal["plain", "shifted", "grid"] = "plain"
    relative_bias: bool = False

    def problems(self) -> list[str]:
        found = super().problems() + among(("plain", "shifted", "grid"), partition=self.partition)
        sides = (self.window,) if isinstance(self.window, int) else self.window
        found += [text for side in sides for text in positive(window=side)]
        if self.relative_bias and self.partition == "grid":
            found.append("relative_bias=True: a grid partition has no small offsets to learn a bias for")
        return found

    def full_budget(self, grid: Grid) -> Window:
        return replace(self, window=grid.sizes, relative_bias=False)

    def period(self, grid: Grid) -> tuple[int, ...] | None:
        window = grid.per_axis(self.window, "window")
        # A window over a whole axis is not shifted, so a larger canvas would shift it.
        whole = any(side >= size for side, size in zip(window, grid.sizes, strict=True))
        return None if self.partition == "grid" or (self.partition == "shifted" and whole) else window

    def build(self, context: BuildContext) -> WindowHeads:
        return WindowHeads(self, context)


class WindowHeads(SoftmaxHeads):
    """Heads of window attention."""

    def __init__(self, options: Window, context: BuildContext) -> None:
        super().__init__(options, context)
        self.window = options
        self.relative_bias: nn.Parameter | None = None
        if options.relative_bias:
            sides = options.window if isinstance(options.window, tuple) else (options.window,) * 2
            extents = [2 * side - 1 for side in sides]
            self.relative_bias = nn.Parameter(nn.init.trunc_normal_(torch.zeros(options.heads, *extents), std=0.02))

    def plan(self, inputs: HeadInputs) -> Plan:
        grid, options = inputs.grid, self.window
        window = grid.per_axis(options.window, "window")
        shift = None
        if options.partition == "shifted":
            shift = tuple(max(side // 2, 1) for side in window)
        layout = Blocks.windows(grid, window, shift=shift, dilated=options.partition == "grid", device=inputs.x.device)
        return Plan(layout, bias=self._bias(grid))

    def definition(self, inputs: HeadInputs) -> Tensor:
        grid, partition = inputs.grid, self.window.partition
        same = torch.ones(grid.image_tokens, grid.image_tokens, dtype=torch.bool)
        for at, size, side in zip(grid.coords().T, grid.sizes, grid.per_axis(self.window.window, "w"), strict=True):
            if partition == "grid":
                window = at % -(-size // min(side, size))
            elif partition == "shifted" and side < size:
                # Windows begin at half a window, and what lies before it is a smaller one.
                window = (at - max(side // 2, 1)).div(side, rounding_mode="floor")
            else:
                window = at // side
            same &= window[:, None] == window
        return same

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        bias = None if self.relative_bias is None else RelativeTable(self.relative_bias, inputs.grid)
        return softmax_heads(self, inputs, attention, bias=bias)

    def _bias(self, grid: Grid) -> RelativeTable | None:
        table: Tensor | None = self.relative_bias
        return None if table is None else RelativeTable(table, grid)
