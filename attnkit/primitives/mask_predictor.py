"""mask_predictor: a cheap low-rank guess of the attention map picks the keys of every query (Sparsifiner)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts import TokenMask, TokenSets
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.choosing import best_keys, best_lists
from attnkit.primitives.guesses import PAPER, GuessHeads, GuessOptions, exact_scores
from attnkit.primitives.softmax import Plan


@dataclass(frozen=True)
class MaskPredictor(GuessOptions):
    """Every query sees the share `keep` of keys that a small learned predictor scores highest, per head.

    The predictor projects q and k to fewer dimensions and k to fewer tokens, takes a softmax over those, keeps the
    largest coefficients, and spreads them over all tokens with a sparse basis. The choice is hard, so the task's loss
    does not reach the predictor: it is trained by reconstructing a teacher's attention (`MaskReconstruction`).

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1, or their (height, width); other grids
            get it resized (a square number as a square image).
        keep: share of image tokens each query sees, in (0, 1], rounded up to whole tokens; 1 is full attention. Where
            tokens are masked or dropped it stays a share of all, so that fewer are seen only where fewer are left.
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: basis rows a query combines, >= 1.
        least_share: instead of so many, a query combines all basis rows of which it takes more than this, >= 0; its
            coefficients are shares that sum to 1.
        threshold: basis entries whose size is not above it count as zero, >= 0.
        tied: use one matrix to shorten the token axis and as the basis.
        prefix: prefix tokens that the basis has rows for, >= 0; the grid must then have as many. Their keys take part
            in the guess, as the class token's does in the authors' code. Prefix tokens are seen by all with or without
            rows, so their own scores only matter where the guess is compared with a whole attention map.
    """

    kind: ClassVar[str] = "mask_predictor"
    paper: ClassVar[str] = PAPER
    formula: ClassVar[str] = (
        "score_i = top8(softmax(s' P q_i . (W_down^T P' k))) |W_up|; out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the keep * N best of score_i"
    )
    cost: ClassVar[str] = "2 N (keep N) C + N^2 h (predictor)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196, "keep": 0.25},)

    keep: float

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < self.keep <= 1:
            found.append(f"keep={self.keep}: must be a share in (0, 1], such as 0.25")
        return found

    def budget(self, grid: Grid) -> int:
        """Image tokens that each query sees: `keep` of them, rounded up, at least one."""
        # 0.07 * 100 is a little more than 7.
        return max(math.ceil(round(self.keep * grid.image_tokens, 6)), 1)

    def full_budget(self, grid: Grid) -> MaskPredictor:
        return replace(self, keep=1.0)

    def build(self, context: BuildContext) -> MaskPredictorHeads:
        return MaskPredictorHeads(self, context)


class MaskPredictorHeads(GuessHeads[MaskPredictor]):
    """Heads of attention under a predicted mask."""

    def plan(self, inputs: HeadInputs) -> Plan:
        grid, tokens = inputs.grid, inputs.x.shape[1]
        guess = self.guess(inputs, self.predicted.prefix)
        budget, prefix = min(self.predicted.budget(grid), tokens - grid.prefix), grid.prefix
        # Whichever is smaller: a key in a list takes four bytes, a place in a mask one.
        if 4 * budget >= tokens - prefix:
            seen, groups = self.choose(best_keys, guess, budget, (prefix, prefix))
            return Plan(TokenMask(seen, query_groups=groups))
        index, groups = self.choose(best_lists, guess, budget, prefix)
        return Plan(TokenSets(index, tokens, queries_all=prefix, keys_all=prefix, query_groups=groups, unique=True))

    @torch.no_grad()
    def definition(self, inputs: HeadInputs) -> Tensor:
        """The choice in float64; where only rounding could decide, it is the model's own."""
        options, grid = self.predicted, inputs.grid
        scores, rounding, unsure = exact_scores(self, options, inputs)
        scores = scores[..., grid.prefix :]
        budget = max(math.ceil(Fraction(str(options.keep)) * grid.image_tokens), 1)
        ranked = torch.cat([scores, torch.full_like(scores[..., :1], -2.0)], dim=-1).sort(-1, descending=True).values
        last, after = ranked[..., budget - 1 : budget], ranked[..., budget : budget + 1]
        tied = (last - after <= rounding) & ((scores - last).abs() <= 2 * rounding)
        own = self.plan(inputs).layout.to_mask()[..., grid.prefix :, grid.prefix :]
        return torch.where(unsure | tied, own, scores >= last)
