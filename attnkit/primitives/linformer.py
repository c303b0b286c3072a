"""linformer: keys and values are mixed down to a few learned combinations of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.layouts import Dense
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import resized, softmax_heads
from attnkit.primitives.resizing import rows_for_grid, trunc_normal
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class Linformer(SoftmaxOptions):
    """Attention to `rank` learned linear combinations of all tokens, one set for keys and one for values.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the combinations are made for, >= 1; other grids get them resized (a square
            number as a square image).
        rank: number of combinations, >= 1.
    """

    kind: ClassVar[str] = "linformer"
    paper: ClassVar[str] = "Wang et al. 2020, Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768"
    formula: ClassVar[str] = "out_i = sum_r softmax_r(s q_i.(E k)_r) (F v)_r"
    cost: ClassVar[str] = "4 N r C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196, "rank": 16},)

    tokens: int
    rank: int

    def problems(self) -> list[str]:
        return super().problems() + positive(tokens=self.tokens, rank=self.rank)

    def build(self, context: BuildContext) -> LinformerHeads:
        return LinformerHeads(self, context)


class LinformerHeads(SoftmaxHeads):
    """Heads of Linformer attention."""

    def __init__(self, options: Linformer, context: BuildContext) -> None:
        super().__init__(options, context)
        self.linformer = options
        self.key_mix = trunc_normal(options.tokens, options.rank)
        self.value_mix = trunc_normal(options.tokens, options.rank)

    def plan(self, inputs: HeadInputs) -> Plan:
        _, k, v = inputs.qkv
        keys, values = self._mixed(k, self.key_mix, inputs), self._mixed(v, self.value_mix, inputs)
        layout = Dense(inputs.grid.tokens, keys.shape[2])
        if inputs.token_mask is not None:
            prefix = inputs.token_mask[:, : inputs.grid.prefix]
            layout = layout.restrict(torch.cat([prefix, prefix.new_ones(len(prefix), self.linformer.rank)], dim=1))
        return Plan(layout, keys=(keys, values), restricted=True)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        grid, mask = inputs.grid, inputs.token_mask
        sees = torch.ones(len(inputs.x), grid.tokens, dtype=torch.bool) if mask is None else mask
        keys = []
        for rows, mix in zip(inputs.qkv[1:], (self.key_mix, self.value_mix), strict=True):
            weight = resized(mix, self.linformer.tokens, grid) * (self.linformer.tokens / grid.image_tokens)
            image = (rows * sees[:, None, :, None])[:, :, grid.prefix :]
            combined = torch.einsum("nr,bhnd->bhrd", weight.to(rows.dtype), image)
            keys.append(torch.cat([rows[:, :, : grid.prefix], combined], dim=2))
        sees = torch.cat([sees[:, : grid.prefix], sees.new_ones(len(sees), self.linformer.rank)], dim=1)
        return softmax_heads(self, inputs, attention, (keys[0], keys[1]), sees=sees[:, None, None])

    def _mixed(self, rows: Tensor, mix: Tensor, inputs: HeadInputs) -> Tensor:
        """(B, heads, N, D) -> (B, heads, prefix + rank, D): prefix tokens stay keys of their own."""
        grid = inputs.grid
        if inputs.token_mask is not None:
            rows = rows.where(inputs.token_mask[:, None, :, None], 0.0)
        weight = rows_for_grid(mix, self.linformer.tokens, grid, summed=True)
        combined = weight.t().to(rows.dtype) @ rows[:, :, grid.prefix :]
        return torch.cat([rows[:, :, : grid.prefix], combined], dim=2) if grid.prefix else combined
