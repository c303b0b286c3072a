"""checkerboard: white tokens see white ones, black tokens see black ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnkit import Grid
from attnkit.layouts import TokenMask
from attnkit.options import positive
from attnkit.primitives import BuildContext, HeadInputs, Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class Checkerboard(SoftmaxOptions):
    """Attention between the tokens of one colour of a checkerboard.

    Args:
        heads: number of heads, >= 1.
        side: side of a square in tokens, >= 1; a square as large as the image is full attention.
    """

    kind: ClassVar[str] = "checkerboard"
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j) v_j, j over the tokens of i's colour"
    cost: ClassVar[str] = "N^2 C"

    side: int = 1

    def problems(self) -> list[str]:
        return super().problems() + positive(side=self.side)

    def full_budget(self, grid: Grid) -> Checkerboard:
        return replace(self, side=max(grid.sizes))

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (2 * self.side,) * grid.ndim

    def build(self, context: BuildContext) -> CheckerboardHeads:
        return CheckerboardHeads(self, context)


class CheckerboardHeads(SoftmaxHeads):
    """Heads of checkerboard attention."""

    def __init__(self, options: Checkerboard, context: BuildContext) -> None:
        super().__init__(options, context)
        self.checkerboard = options

    def plan(self, inputs: HeadInputs) -> Plan:
        grid = inputs.grid
        colour = (grid.coords(inputs.x.device) // self.checkerboard.side).sum(-1) % 2
        mask = colour[:, None] == colour
        # Prefix tokens see all and are seen by all.
        mask = torch.nn.functional.pad(mask, (grid.prefix, 0, grid.prefix, 0), value=True)
        return Plan(TokenMask(mask))

    def definition(self, inputs: HeadInputs) -> Tensor:
        squares = (inputs.grid.coords() // self.checkerboard.side).tolist()
        return torch.tensor([[(sum(query) + sum(key)) % 2 == 0 for key in squares] for query in squares])
