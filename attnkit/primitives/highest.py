"""The highest of many scores, by a search for the number that just so many are above."""

from __future__ import annotations

import torch
from torch import Tensor

# With fewer scores PyTorch's own topk is faster than a search whose steps are a dozen operators each.
SEARCHED = 1 << 16
# More steps than a search between numbers that differ ever takes, but for a few rows.
STEPS = 24
# Scores that are compared at one time.
SCRATCH = 1 << 17


class Highest:
    """The `budget` highest of each row, for one piece of the scores after another.

    Args:
        budget: how many, >= 0.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # The limit as a share of the row's highest score, and by which share it falls for one key more.
        self.share = self.slope = torch.nan

    def __call__(self, scores: Tensor) -> Tensor:
        """A mask (rows, keys); its dtype is bool or that of the scores."""
        if not 0 < self.budget < scores.shape[1]:
            return torch.full_like(scores, self.budget > 0, dtype=torch.bool)
        if scores.device.type != "cpu" or scores.numel() < SEARCHED:
            return self._topk(scores)
        limit = self._limits(scores)
        found = torch.gt(scores, limit, out=torch.empty_like(scores))
        tied = limit.isnan().flatten().nonzero().flatten()
        if tied.numel():
            found[tied] = self._topk(scores[tied]).to(found.dtype)
        return found

    def _topk(self, scores: Tensor) -> Tensor:
        index = scores.topk(self.budget, dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)

    def _excess(self, scores: Tensor, limit: Tensor) -> Tensor:
        """By how many more scores than the budget lie above a limit: (rows, 1)."""
        rows, keys = scores.shape
        step = max(SCRATCH // keys, 1)
        count = scores.new_empty(rows, 1)
        # Comparisons that write floats are several times as fast as those that write bools.
        scratch = scores.new_empty(min(step, rows), keys)
        for at in range(0, rows, step):
            part = scores[at : at + step]
            above = torch.gt(part, limit[at : at + step], out=scratch[: part.shape[0]])
            torch.sum(above, -1, keepdim=True, out=count[at : at + step])
        return count.sub_(self.budget)

    def _limits(self, scores: Tensor) -> Tensor:
        """For each row (rows, keys) a number below exactly `budget` scores, (rows, 1); NaN where none was found.

        Counting the scores above a number is far faster than PyTorch's topk, so that a secant search (the Illinois
        rule, which halves the weight of an end that stays) between 0 and the highest score wins. Rows are alike, so
        that the first two steps are those of the piece before. Where scores are equal at the border, there is no such
        number.
        """
        rows, keys = scores.shape
        found = scores.new_full((rows, 1), torch.nan)
        low, high = scores.new_zeros(rows, 1), scores.amax(-1, keepdim=True)
        peak, known = high, self.share == self.share
        # Of scores above 0 there may be fewer, in which case equal ones decide.
        more = torch.full_like(high, keys - self.budget) if known else self._excess(scores, low)
        less = torch.full_like(high, -self.budget)
        stayed = torch.zeros_like(high)
        left, live = scores, torch.arange(rows, device=scores.device)
        drop, limit, count = more < 0, high, high
        for turn in range(STEPS):
            if int(drop.sum()) * 2 >= len(drop):
                stay = (~drop).flatten().nonzero().flatten()
                if not stay.numel():
                    break
                left, live = left.index_select(0, stay), live[stay]
                state = torch.cat([low, high, more, less, stayed, limit, count], dim=1).index_select(0, stay)
                low, high, more, less, stayed, limit, count = state.split(1, dim=1)
            if known and turn == 0:
                limit = high * self.share
            elif known and turn == 1:
                limit = (limit * (1.0 + count * self.slope)).clamp(low, high)
            else:
                limit = low + (high - low) * (more / (more - less))
            count = self._excess(left, limit)
            drop = count == 0
            found.index_copy_(0, live, limit.masked_fill(~drop, torch.nan))
            above = (count > 0).to(limit.dtype)
            less = torch.lerp(count, less - 0.5 * less * (stayed > 0), above)
            more = torch.lerp(more - 0.5 * more * (stayed < 0), count, above)
            low, high = torch.lerp(low, limit, above), torch.lerp(limit, high, above)
            stayed = 2.0 * above - 1.0
        self._learn(scores, found, peak)
        return found

    def _learn(self, scores: Tensor, found: Tensor, peak: Tensor) -> None:
        share = float((found / peak).nanmedian())
        if int(found.isnan().sum()) * 4 > len(found):
            share = torch.nan
        elif self.slope != self.slope:
            # A third more than the slope, to end on the other side.
            fewer = float(self._excess(scores, found * 1.01).nanmean())
            self.slope = 0.013 / max(-fewer, 1.0)
        self.share = share
