"""competing_mask_predictor: a mask predictor with two habits of its authors' code (Sparsifiner)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts import TokenMask
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.choosing import best_keys, keys_above
from attnkit.primitives.guesses import PAPER, GuessHeads, GuessOptions, exact_scores
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.softmax import Plan


@dataclass(frozen=True)
class CompetingMaskPredictor(GuessOptions):
    """A mask predictor as its authors' code has it, for weights that were trained with it.

    Two things are not as in `mask_predictor`, which is the better choice for anything new. Prefix tokens that have rows
    get no place of their own among the keys of image tokens: they compete for one, and the budget counts them. And to
    prefix queries, masked tokens are still there, as keys and values of zeros: they take softmax weight and add
    nothing. Image queries do not see masked tokens; where fewer are left than the budget, the budget is as many as
    there are image tokens left.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1, or their (height, width); other grids
            get it resized (a square number as a square image).
        keep: share of tokens each image query sees, prefix tokens with rows included, in (0, 1], rounded up.
        score: instead of that share, an image query sees all keys that score above this.
        blind: queries of masked tokens see nothing at all.
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: basis rows a query combines, >= 1.
        least_share: instead of so many, a query combines all basis rows of which it takes more than this, >= 0; its
            coefficients are shares that sum to 1.
        threshold: basis entries whose size is not above it count as zero, >= 0.
        tied: use one matrix to shorten the token axis and as the basis.
        prefix: prefix tokens that the basis has rows for, as in `mask_predictor`.
    """

    kind: ClassVar[str] = "competing_mask_predictor"
    paper: ClassVar[str] = f"{PAPER} (as in the authors' code)"
    formula: ClassVar[str] = (
        "score_i = top8(softmax(s' P q_i . (W_down^T P' k))) |W_up|; out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the keep * N best of score_i, prefix tokens among them"
    )
    cost: ClassVar[str] = "2 N (keep N) C + N^2 h (predictor)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196, "keep": 0.25},)

    keep: float
    _: KW_ONLY
    score: float | None = None
    blind: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < self.keep <= 1:
            found.append(f"keep={self.keep}: must be a share in (0, 1], such as 0.25")
        if self.score is not None and not math.isfinite(self.score):
            found.append(f"score={self.score}: must be a finite number")
        return found

    def budget(self, grid: Grid) -> int:
        """Tokens that each image query sees, rounded up as the authors do: 0.07 of 100 tokens are 8."""
        return max(math.ceil(self.keep * (grid.image_tokens + self.prefix)), 1)

    def full_budget(self, grid: Grid) -> CompetingMaskPredictor:
        return replace(self, keep=1.0, score=None)

    def build(self, context: BuildContext) -> CompetingMaskPredictorHeads:
        return CompetingMaskPredictorHeads(self, context)


class CompetingMaskPredictorHeads(GuessHeads[CompetingMaskPredictor]):
    """Heads of attention under a mask as the authors' code predicts it."""

    global_prefix: ClassVar[bool] = False

    def accepts_places(self) -> bool:
        return False

    def plan(self, inputs: HeadInputs) -> Plan:
        options, grid, mask = self.predicted, inputs.grid, inputs.token_mask
        _, k, v = inputs.qkv
        guess, before = self.guess(inputs), (grid.prefix, grid.prefix - options.prefix)
        if options.score is not None:
            seen, groups = self.choose(keys_above, guess, options.score, before)
        else:
            budget = min(options.budget(grid), guess.basis.shape[-1])
            most = None if mask is None else self._most(mask, grid).flatten()
            seen, groups = self.choose(best_keys, guess, budget, before, most)
        if mask is None:
            return Plan(TokenMask(seen, query_groups=groups))
        left = mask[:, None, None].expand(-1, 1, grid.image_tokens, -1)
        if options.blind:
            left = left & mask[:, None, grid.prefix :, None]
        seen = seen & torch.cat([left.new_ones(*left.shape[:2], grid.prefix, left.shape[-1]), left], dim=2)
        zeroed = tuple(one.where(mask[:, None, :, None], 0.0) for one in (k, v))
        return Plan(TokenMask(seen, query_groups=groups), keys=(zeroed[0], zeroed[1]), restricted=True)

    def _most(self, mask: Tensor, grid: Grid) -> Tensor:
        """The largest budget: (B, 1, 1, 1). Prefix tokens count where all image tokens are left, else they do not."""
        left = mask[:, grid.prefix :].sum(1)
        return (left + self.predicted.prefix * (left == grid.image_tokens))[:, None, None, None]

    @torch.no_grad()
    def sees(self, inputs: HeadInputs) -> Tensor:
        """Which keys each query sees, in float64; where only rounding could decide, it is the model's own."""
        options, grid = self.predicted, inputs.grid
        batch, tokens = inputs.x.shape[:2]
        mask = torch.ones(batch, tokens, dtype=torch.bool) if inputs.token_mask is None else inputs.token_mask
        first = grid.prefix - options.prefix
        scores, rounding, unsure = exact_scores(self, options, inputs)
        scores = scores[..., first:]
        if options.score is not None:
            seen, tied = scores > options.score, (scores - options.score).abs() <= 2 * rounding
        else:
            share = max(math.ceil(options.keep * (grid.image_tokens + options.prefix)), 1)
            most = self._most(mask, grid).clamp(max=share).expand(-1, *scores.shape[1:3], 1)
            ranked = scores.sort(-1, descending=True).values
            ranked = torch.cat(
                [torch.full_like(ranked[..., :1], 1e9), ranked, torch.full_like(ranked[..., :1], -2)], -1
            )
            last, after = ranked.gather(-1, most), ranked.gather(-1, most + 1)
            seen = scores >= last
            tied = (last - after <= rounding) & ((scores - last).abs() <= 2 * rounding)
        seen = torch.cat([torch.ones(*seen.shape[:3], first, dtype=torch.bool), seen], dim=-1) & mask[:, None, None]
        if options.blind:
            seen = seen & mask[:, None, grid.prefix :, None]
        tied = torch.nn.functional.pad(tied, (first, 0)) | unsure
        own = self.plan(inputs).layout.to_mask()
        seen = torch.where(tied, own[:, :, grid.prefix :], seen)
        return torch.cat([torch.ones(*seen.shape[:2], grid.prefix, tokens, dtype=torch.bool), seen], dim=2)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        _, k, v = inputs.qkv
        mask = inputs.token_mask
        kept = torch.ones(inputs.x.shape[:2], dtype=torch.bool) if mask is None else mask
        zeroed = tuple(torch.where(kept[:, None, :, None], one, 0.0) for one in (k, v))
        return softmax_heads(self, inputs, attention, (zeroed[0], zeroed[1]), sees=self.sees(inputs))
