"""cross_shaped: half of the heads attend in horizontal stripes, half in vertical ones (CSWin)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.kernels import attend
from attnkit.layouts import Blocks
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadGroup, HeadInputs, HeadOutput, PrimitiveOptions


@dataclass(frozen=True)
class CrossShaped(PrimitiveOptions):
    """Attention in stripes: the first half of the heads in horizontal ones, the second half in vertical ones.

    Args:
        heads: number of heads, even, >= 2.
        stripe: width of a stripe in tokens, >= 1; 1 is axial attention.
    """

    kind: ClassVar[str] = "cross_shaped"
    paper: ClassVar[str] = "Dong et al. 2022, CSWin Transformer, arXiv 2107.00652"
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j) v_j, j over the row (or column) stripe of i"
    cost: ClassVar[str] = "N s (H + W) C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"stripe": 2},)

    stripe: int

    def problems(self) -> list[str]:
        found = super().problems() + positive(stripe=self.stripe)
        if self.heads % 2:
            found.append(f"heads={self.heads}: must be even, half for rows and half for columns")
        return found

    def full_budget(self, grid: Grid) -> CrossShaped:
        return replace(self, stripe=max(grid.sizes))

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (self.stripe,) * grid.ndim

    def build(self, context: BuildContext) -> CrossShapedHeads:
        return CrossShapedHeads(self)


class CrossShapedHeads(HeadGroup):
    """Heads of cross-shaped window attention."""

    def __init__(self, options: CrossShaped) -> None:
        super().__init__()
        self.options = options

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        grid, stripe = inputs.grid, self.options.stripe
        if grid.ndim != 2:
            raise ShapeError(f"cross-shaped attention needs a grid of height and width, but got {grid}")
        outs = []
        windows = ((stripe, grid.width), (grid.height, stripe))
        half = self.options.heads // 2
        for window, heads in zip(windows, (slice(0, half), slice(half, None)), strict=True):
            layout = Blocks.windows(grid, window, device=inputs.x.device)
            if inputs.token_mask is not None:
                layout = layout.restrict(inputs.token_mask)
            q, k, v = (one[:, heads] for one in inputs.qkv)
            outs.append(attend(q, k, v, layout))
        return HeadOutput(torch.cat(outs, dim=1), grid)

    def definition(self, inputs: HeadInputs) -> Tensor:
        stripe = inputs.grid.coords().T // self.options.stripe
        same = stripe[:, :, None] == stripe[:, None]
        return same[None].repeat_interleave(self.options.heads // 2, dim=1)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        q, k, v = inputs.qkv
        return attention(q, k, v, scale=q.shape[3] ** -0.5)

    def extra_repr(self) -> str:
        return repr(self.options)
