"""pooled_global: every token sees the whole image through averaged cells (Vision Big Bird's global heads, PVT)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from attnkit.grid import Grid
from attnkit.layouts import Dense
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, Columns, HeadInputs
from attnkit.primitives.plain import softmax_heads, split
from attnkit.primitives.pooling import cell_means
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class PooledGlobal(SoftmaxOptions):
    """Attention of every token to the means of pool x pool cells; keys and values are projected after pooling.

    Cells at the edge average the tokens that exist. Prefix tokens are keys of their own. `pool=1` is full attention.

    Args:
        heads: number of heads, >= 1.
        pool: tokens per side of a cell, >= 1.
    """

    kind: ClassVar[str] = "pooled_global"
    paper: ClassVar[str] = (
        "Zhang and Gong 2023, Vision Big Bird, arXiv 2311.05988; spatial reduction: PVT, arXiv 2102.12122"
    )
    formula: ClassVar[str] = "y_c = mean(x in cell c); out_i = sum_c softmax_c(s q_i.K y_c) V y_c"
    cost: ClassVar[str] = "2 N (N / r^2) C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"pool": 2}, {"pool": 4})

    pool: int

    def problems(self) -> list[str]:
        return super().problems() + positive(pool=self.pool)

    def columns(self, context: BuildContext) -> Columns:
        width = self.heads * context.head_dim
        return Columns(q=width, v=width if self.lepe and self.lepe_on == "v" else 0)

    def full_budget(self, grid: Grid) -> PooledGlobal:
        return replace(self, pool=1)

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (self.pool,) * grid.ndim

    def build(self, context: BuildContext) -> PooledGlobalHeads:
        return PooledGlobalHeads(self, context)


class PooledGlobalHeads(SoftmaxHeads):
    """Heads of pooled attention, with their own projection of the pooled tokens."""

    def __init__(self, options: PooledGlobal, context: BuildContext) -> None:
        super().__init__(options, context)
        self.pooled = options
        self.kv = nn.Linear(context.dim, 2 * options.heads * context.head_dim)

    def plan(self, inputs: HeadInputs) -> Plan:
        grid, pool = inputs.grid, self.pooled.pool
        lengths = tuple(min(pool, size) for size in grid.sizes)
        cells = tuple(-(-size // length) for size, length in zip(grid.sizes, lengths, strict=True))
        means, counts = cell_means(inputs.x, grid, cells, lengths, inputs.token_mask)
        tokens = torch.cat([inputs.x[:, : grid.prefix], means], dim=1) if grid.prefix else means
        k, v = rearrange(self.kv(tokens), "b n (two h d) -> two b h n d", two=2, h=self.pooled.heads)
        layout = Dense(grid.tokens, tokens.shape[1])
        if inputs.token_mask is not None:
            layout = layout.restrict(torch.cat([inputs.token_mask[:, : grid.prefix], counts > 0], dim=1))
        return Plan(layout, keys=(k, v), restricted=True)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        x, grid, mask = inputs.x, inputs.grid, inputs.token_mask
        kept = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        cell = grid.coords() // self.pooled.pool
        tokens, sees = [x[:, : grid.prefix]], [kept[:, : grid.prefix]]
        for one in itertools.product(*(range(-(-size // self.pooled.pool)) for size in grid.sizes)):
            inside = (cell == torch.tensor(one)).all(-1) & kept[:, grid.prefix :]
            count = inside.sum(-1, keepdim=True)
            total = (x[:, grid.prefix :] * inside[..., None]).sum(1)
            tokens.append((total / count.clamp(min=1))[:, None])
            sees.append(count > 0)
        k, v = self.kv(torch.cat(tokens, dim=1)).chunk(2, dim=-1)
        heads = self.pooled.heads
        keys, seen = (split(k, heads), split(v, heads)), torch.cat(sees, dim=1)
        return softmax_heads(self, inputs, attention, keys, sees=seen[:, None, None])
