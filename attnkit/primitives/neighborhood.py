"""neighborhood: every token sees the k x k tokens nearest to it (NAT, DiNAT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnkit.grid import Grid
from attnkit.layouts import RelativeTable, Stencil
from attnkit.options import odd, positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class Neighborhood(SoftmaxOptions):
    """Attention over the kernel x kernel tokens around each token; at the border the window moves inside.

    Args:
        heads: number of heads, >= 1.
        kernel: tokens per side of the neighborhood, odd, >= 1; a kernel that exceeds the grid covers it.
        dilation: step between neighbours in tokens, >= 1 (DiNAT).
        relative_bias: learn a bias per head and offset.
    """

    kind: ClassVar[str] = "neighborhood"
    paper: ClassVar[str] = (
        "Hassani et al. 2023, Neighborhood Attention Transformer, arXiv 2204.07143; dilated: arXiv 2209.15001"
    )
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j + b[j - i]) v_j, j over the k^2 tokens nearest to i"
    cost: ClassVar[str] = "2 N k^2 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"kernel": 5}, {"kernel": 5, "dilation": 2})

    kernel: int
    _: KW_ONLY
    dilation: int = 1
    relative_bias: bool = False

    def problems(self) -> list[str]:
        return super().problems() + odd(kernel=self.kernel) + positive(dilation=self.dilation)

    def full_budget(self, grid: Grid) -> Neighborhood:
        return replace(self, kernel=2 * max(grid.sizes) - 1, dilation=1, relative_bias=False)

    def build(self, context: BuildContext) -> NeighborhoodHeads:
        return NeighborhoodHeads(self, context)


class NeighborhoodHeads(SoftmaxHeads):
    """Heads of neighborhood attention."""

    def __init__(self, options: Neighborhood, context: BuildContext) -> None:
        super().__init__(options, context)
        self.neighborhood = options
        self.relative_bias: nn.Parameter | None = None
        if options.relative_bias:
            # At the border a neighbour may be up to a whole window away instead of half of one.
            extent = 2 * (options.kernel - 1) * options.dilation + 1
            self.relative_bias = nn.Parameter(torch.zeros(options.heads, extent, extent))

    def plan(self, inputs: HeadInputs) -> Plan:
        options, grid = self.neighborhood, inputs.grid
        layout = Stencil(grid, options.kernel, dilation=options.dilation, border="clamp")
        bias = None if self.relative_bias is None else RelativeTable(self.relative_bias, grid)
        return Plan(layout, bias=bias)

    def definition(self, inputs: HeadInputs) -> Tensor:
        options, grid = self.neighborhood, inputs.grid
        sees = torch.ones(grid.image_tokens, grid.image_tokens, dtype=torch.bool)
        for at, size in zip(grid.coords().T, grid.sizes, strict=True):
            near = torch.zeros(size, size, dtype=torch.bool)
            for query in range(size):
                reachable = range(query % options.dilation, size, options.dilation)
                starts = range(max(len(reachable) - options.kernel, 0) + 1)
                windows = [reachable[start : start + options.kernel] for start in starts]
                best = min(windows, key=lambda keys: abs(keys[0] + keys[-1] - 2 * query))
                near[query, list(best)] = True
            sees &= near[at][:, at]
        return sees

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        bias = None if self.relative_bias is None else RelativeTable(self.relative_bias, inputs.grid)
        return softmax_heads(self, inputs, attention, bias=bias)
