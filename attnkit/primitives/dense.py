"""dense: every token sees every token (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts import Dense as DenseLayout
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class Dense(SoftmaxOptions):
    """Full attention: every token sees every token, prefix tokens included.

    Args:
        heads: number of heads, >= 1.
    """

    kind: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762"
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j) v_j, j over all N tokens"
    cost: ClassVar[str] = "2 N^2 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def full_budget(self, grid: Grid) -> Dense:
        return self

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (1,) * grid.ndim

    def build(self, context: BuildContext) -> DenseHeads:
        return DenseHeads(self, context)


class DenseHeads(SoftmaxHeads):
    """Heads of full attention."""

    def plan(self, inputs: HeadInputs) -> Plan:
        return Plan(DenseLayout.square(inputs.x.shape[1]))

    def accepts_places(self) -> bool:
        return self.lepe is None

    def definition(self, inputs: HeadInputs) -> Tensor:
        return torch.ones(inputs.grid.image_tokens, inputs.grid.image_tokens, dtype=torch.bool)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        return softmax_heads(self, inputs, attention)
