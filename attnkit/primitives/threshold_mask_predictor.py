"""threshold_mask_predictor: all keys that a cheap guess of the attention map scores high enough (Sparsifiner)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts import TokenMask
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.choosing import keys_above
from attnkit.primitives.guesses import PAPER, GuessHeads, GuessOptions, exact_scores
from attnkit.primitives.softmax import Plan


@dataclass(frozen=True)
class ThresholdMaskPredictor(GuessOptions):
    """Every query sees the keys that a small learned predictor scores above `score`, per head.

    As `mask_predictor`, but how many keys a query sees depends on the input; it may be none.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1, or their (height, width); other grids
            get it resized (a square number as a square image).
        score: keys must score above this. Scores are >= 0, so that below 0 all keys are seen.
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: basis rows a query combines, >= 1.
        least_share: instead of so many, a query combines all basis rows of which it takes more than this, >= 0; its
            coefficients are shares that sum to 1.
        threshold: basis entries whose size is not above it count as zero, >= 0.
        tied: use one matrix to shorten the token axis and as the basis.
        prefix: prefix tokens that the basis has rows for, as in `mask_predictor`.
    """

    kind: ClassVar[str] = "threshold_mask_predictor"
    paper: ClassVar[str] = PAPER
    formula: ClassVar[str] = (
        "score_i = top8(softmax(s' P q_i . (W_down^T P' k))) |W_up|; out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the keys with score_ij > score"
    )
    cost: ClassVar[str] = "2 (pairs kept) C + N^2 h (predictor)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196, "score": 0.1},)

    _: KW_ONLY
    score: float = 1e-4

    def problems(self) -> list[str]:
        found = super().problems()
        if not math.isfinite(self.score):
            found.append(f"score={self.score}: must be a finite number")
        return found

    def full_budget(self, grid: Grid) -> ThresholdMaskPredictor:
        return replace(self, score=-1.0)

    def build(self, context: BuildContext) -> ThresholdMaskPredictorHeads:
        return ThresholdMaskPredictorHeads(self, context)


class ThresholdMaskPredictorHeads(GuessHeads[ThresholdMaskPredictor]):
    """Heads of attention to the keys that score high enough."""

    def plan(self, inputs: HeadInputs) -> Plan:
        guess, prefix = self.guess(inputs, self.predicted.prefix), inputs.grid.prefix
        seen, groups = self.choose(keys_above, guess, self.predicted.score, (prefix, prefix))
        return Plan(TokenMask(seen, query_groups=groups))

    @torch.no_grad()
    def definition(self, inputs: HeadInputs) -> Tensor:
        """The choice in float64; where only rounding could decide, it is the model's own."""
        prefix = inputs.grid.prefix
        scores, rounding, unsure = exact_scores(self, self.predicted, inputs)
        scores = scores[..., prefix:]
        own = self.plan(inputs).layout.to_mask()[..., prefix:, prefix:]
        close = (scores - self.predicted.score).abs() <= 2 * rounding
        return torch.where(unsure | close, own, scores > self.predicted.score)
