"""mask_predictor: a cheap low-rank guess of the attention map picks the keys of every query (Sparsifiner)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.kernels.precision import without_autocast
from attnkit.layouts import TokenSets
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import resized, softmax_heads
from attnkit.primitives.resizing import rows_for_grid, trunc_normal
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class MaskPredictor(SoftmaxOptions):
    """Every query sees the share `keep` of keys that a small learned predictor scores highest, per head.

    The predictor projects q and k to fewer dimensions and k to fewer tokens, takes a softmax over those, keeps the
    largest coefficients, and spreads them over all tokens with a sparse basis. The choice is hard, so the task's loss
    does not reach the predictor: it is trained by reconstructing a teacher's attention.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1; other grids get it resized (a square
            number as a square image).
        keep: share of image tokens each query sees, in (0, 1], rounded up to whole tokens; 1 is full attention.
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: basis rows a query combines, >= 1.
        threshold: basis entries not above it count as zero, >= 0.
        prefix: prefix tokens that the basis has rows for, >= 0; the grid must then have as many. Their keys take part
            in the guess, as the class token's does in the authors' code. Prefix tokens are seen by all with or without
            rows, so their own scores only matter where the guess is compared with a whole attention map.
    """

    kind: ClassVar[str] = "mask_predictor"
    paper: ClassVar[str] = (
        "Wei et al. 2023, Sparsifiner: Learning Sparse Instance-Dependent Attention, arXiv 2303.13755"
    )
    formula: ClassVar[str] = (
        "score_i = top8(softmax(s' P q_i . (W_down^T P' k))) |W_up|; out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the keep * N best of score_i"
    )
    cost: ClassVar[str] = "2 N (keep N) C + N^2 h (predictor)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196, "keep": 0.25},)

    tokens: int
    keep: float
    _: KW_ONLY
    reduce_dim: int = 2
    reduce_tokens: int = 6
    coefficients: int = 8
    threshold: float = 0.02
    prefix: int = 0

    def problems(self) -> list[str]:
        found = super().problems() + positive(
            tokens=self.tokens,
            reduce_dim=self.reduce_dim,
            reduce_tokens=self.reduce_tokens,
            coefficients=self.coefficients,
        )
        if not 0 < self.keep <= 1:
            found.append(f"keep={self.keep}: must be a share in (0, 1], such as 0.25")
        if self.threshold < 0:
            found.append(f"threshold={self.threshold}: must be >= 0")
        if self.prefix < 0:
            found.append(f"prefix={self.prefix}: must be >= 0 tokens")
        return found

    def budget(self, grid: Grid) -> int:
        """Image tokens that each query sees: `keep` of them, rounded up, at least one."""
        # 0.07 * 100 is a little more than 7.
        return max(math.ceil(round(self.keep * grid.image_tokens, 6)), 1)

    def full_budget(self, grid: Grid) -> MaskPredictor:
        return replace(self, keep=1.0)

    def build(self, context: BuildContext) -> MaskPredictorHeads:
        return MaskPredictorHeads(self, context)


class MaskPredictorHeads(SoftmaxHeads):
    """Heads of attention under a predicted mask."""

    choosers: ClassVar[tuple[str, ...]] = ("predictor",)

    def __init__(self, options: MaskPredictor, context: BuildContext) -> None:
        super().__init__(options, context)
        self.predicted = options
        self.predictor = Predictor(options, context.head_dim)

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, _ = inputs.qkv
        grid = inputs.grid
        budget = self.predicted.budget(grid)
        with torch.no_grad(), without_autocast(q.device):
            scores = self.predictor(q.detach().float(), k.detach().float(), inputs)
            index = scores.topk(budget, dim=-1).indices + grid.prefix
        layout = TokenSets(index, grid.tokens, queries_all=grid.prefix, keys_all=grid.prefix, unique=True)
        return Plan(layout)

    @torch.no_grad()
    def definition(self, inputs: HeadInputs) -> Tensor:
        """The choice in float64; where only rounding could decide, it is the model's own."""
        options, grid, guess = self.predicted, inputs.grid, self.predictor
        q, k, _ = (one.double() for one in inputs.qkv)
        kept = torch.ones(len(q), grid.tokens, dtype=torch.bool) if inputs.token_mask is None else inputs.token_mask
        down = torch.zeros(grid.tokens, guess.down.shape[1], dtype=torch.float64)
        down[grid.prefix - options.prefix : grid.prefix] = guess.down[: options.prefix].double()
        down[grid.prefix :] = resized(guess.down, options.tokens, grid) * (options.tokens / grid.image_tokens)
        basis = resized(guess.up, options.tokens, grid).abs()
        basis = basis * (basis > options.threshold)
        small_q = q[:, :, grid.prefix :] @ guess.query.weight.double().t() + guess.query.bias.double()
        small_k = k @ guess.key.weight.double().t() + guess.key.bias.double()
        pooled = torch.einsum("bhnd,bn,nr->bhrd", small_k, kept.double(), down)
        logits = torch.einsum("bhnd,bhrd->bhnr", small_q, pooled) / options.heads**0.5
        rounding = 1e-6 * (1.0 + logits.abs().amax(-1, keepdim=True))
        least = logits.sort(-1, descending=True).values[..., : options.coefficients + 1]
        share = logits.softmax(-1)
        if least.shape[-1] > options.coefficients:
            unsure = least[..., -2:-1] - least[..., -1:] < rounding
            share = share * (logits > least[..., -1:])
        else:
            unsure = torch.zeros_like(rounding, dtype=torch.bool)
        scores = torch.einsum("bhnr,mr->bhnm", share, basis)
        # Below 1e-37 float32 has no numbers, or few.
        rounding = rounding * scores.amax(-1, keepdim=True) + 1e-37
        scores = scores.masked_fill(~kept[:, None, None, grid.prefix :], -1.0)
        budget = max(math.ceil(Fraction(str(options.keep)) * grid.image_tokens), 1)
        ranked = torch.cat([scores, torch.full_like(scores[..., :1], -2.0)], dim=-1).sort(-1, descending=True).values
        last, after = ranked[..., budget - 1 : budget], ranked[..., budget : budget + 1]
        tied = (last - after <= rounding) & ((scores - last).abs() <= 2 * rounding)
        own = self.plan(inputs).layout.to_mask()[..., grid.prefix :, grid.prefix :]
        return torch.where(unsure | tied, own, scores >= last)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        return softmax_heads(self, inputs, attention)


class Predictor(nn.Module):
    """The low-rank guess of an attention map; its weights are shared by the heads."""

    def __init__(self, options: MaskPredictor, head_dim: int) -> None:
        super().__init__()
        self.options = options
        width = max(head_dim // options.reduce_dim, 1)
        rows = options.prefix + options.tokens
        rank = max(rows // options.reduce_tokens, 1)
        self.query = nn.Linear(head_dim, width)
        self.key = nn.Linear(head_dim, width)
        self.down = trunc_normal(rows, rank)
        self.up = trunc_normal(rows, rank)
        for linear in (self.query, self.key):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, q: Tensor, k: Tensor, inputs: HeadInputs) -> Tensor:
        """Scores of all image tokens for all image queries.

        Args:
            q: (B, heads, N, D) in float32.
            k: (B, heads, N, D) in float32.
            inputs: the group's inputs, for grid and token mask.

        Returns:
            (B, heads, N - prefix, N - prefix); masked tokens score -inf.
        """
        options, grid = self.options, inputs.grid
        weights = [self.query.weight, self.query.bias, self.key.weight, self.key.bias]
        query_weight, query_bias, key_weight, key_bias = (weight.float() for weight in weights)
        if options.prefix not in (0, grid.prefix):
            raise ShapeError(
                f"this mask predictor has rows for {options.prefix} prefix tokens, but the grid has {grid.prefix}; "
                f"give it prefix={grid.prefix}"
            )
        down = rows_for_grid(self.down.float(), options.tokens, grid, summed=True)
        if options.prefix:
            down = torch.cat([self.down[: options.prefix].float(), down])
        first = grid.prefix - options.prefix
        up = rows_for_grid(self.up.float(), options.tokens, grid, summed=False)
        small_q = nn.functional.linear(q[:, :, grid.prefix :], query_weight, query_bias)
        small_k = nn.functional.linear(k[:, :, first:], key_weight, key_bias)
        if inputs.token_mask is not None:
            small_k = small_k.where(inputs.token_mask[:, None, first:, None], 0.0)
        # The authors' code scales by the number of heads; published weights depend on it.
        logits = (small_q @ (small_k.transpose(-2, -1) @ down)) * options.heads**-0.5
        coefficients = logits.softmax(-1)
        best = coefficients.topk(min(options.coefficients, coefficients.shape[-1]), dim=-1)
        sparse = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
        basis = up.abs()
        basis = basis.where(basis > options.threshold, 0.0)
        scores = sparse @ basis.t()
        if inputs.token_mask is not None:
            scores = scores.masked_fill(~inputs.token_mask[:, None, None, grid.prefix :], -torch.inf)
        return scores
