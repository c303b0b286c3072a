"""The highest of many scores, by a search for the number that just so many are above."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.layouts.token_sets import may_look

# With fewer scores PyTorch's own topk is faster than a search whose steps are a dozen operators each.
SEARCHED = 1 << 16
# More steps than a search between numbers that differ ever takes, but for a few rows.
STEPS = 24
# Scores that are compared at one time.
SCRATCH = 1 << 18
# Rows that are sorted where nothing is known yet.
SAMPLE = 8


class Highest:
    """The `budget` highest of each row, for one piece of the scores after another.

    Args:
        budget: how many, >= 0.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # The limit as a share of the row's mean, and by which share it rises for one key less.
        self.share = self.slope = torch.nan

    def __call__(self, scores: Tensor) -> Tensor:
        """A mask (rows, keys), bool or of the scores' dtype. It may lie where the scores lay, each >= 0 or -inf."""
        if not 0 < self.budget < scores.shape[1]:
            return torch.full_like(scores, self.budget > 0, dtype=torch.bool)
        if self.sorts(scores):
            return self._topk(scores)
        limit = self._limits(scores)
        tied = limit.isnan().flatten().nonzero().flatten()
        settled = self._topk(scores[tied]).to(scores.dtype)
        # Comparisons that write floats are several times as fast as those that write bools.
        return scores.gt_(limit).index_copy_(0, tied, settled)

    @staticmethod
    def sorts(scores: Tensor) -> bool:
        """Whether it is left to PyTorch's topk, which is faster for few scores and looks at no value."""
        return scores.numel() < SEARCHED or not may_look(scores)

    def _topk(self, scores: Tensor) -> Tensor:
        index = scores.topk(self.budget, dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)

    def _excess(self, scores: Tensor, limit: Tensor) -> Tensor:
        """By how many more scores than the budget lie above a limit: (rows, 1)."""
        step = min(max(SCRATCH // scores.shape[1], 1), len(scores))
        count, scratch = torch.empty_like(limit), scores.new_empty(step, scores.shape[1])
        for part, border, into in zip(scores.split(step), limit.split(step), count.split(step), strict=True):
            torch.sum(torch.gt(part, border, out=scratch[: len(part)]), -1, keepdim=True, out=into)
        return count.sub_(self.budget)

    def _limits(self, scores: Tensor) -> Tensor:
        """For each row (rows, keys) a number below exactly `budget` scores, (rows, 1); NaN where none was found.

        Counting the scores above a number is far faster than PyTorch's topk. Rows are alike, so that the search begins
        at the share of a row's mean that was right before, and steps on as the count fell before; then it goes on as a
        secant search (the Illinois rule, which halves the weight of an end that stays). Where scores are equal at the
        border, there is no such number.
        """
        rows, keys = scores.shape
        found = scores.new_full((rows, 1), torch.nan)
        low, high, mean = scores.new_zeros(rows, 1), scores.amax(-1, keepdim=True), scores.mean(-1, keepdim=True)
        if not bool(mean.isfinite().all()):
            mean = scores.clamp(min=0.0).mean(-1, keepdim=True)
        if self.share != self.share:
            self._sample(scores, mean)
        if self.share == 0.0:
            self.share = torch.nan
            return found
        # Of scores above 0 there may be fewer, in which case equal ones decide.
        more, less = torch.full_like(high, keys - self.budget), torch.full_like(high, -self.budget)
        first = limit = mean * self.share
        fewer, last, right = limit, high > high, torch.full_like(high, torch.nan)
        left, live = scores, torch.arange(rows, device=scores.device)
        for turn in range(STEPS):
            count = self._excess(left, limit)
            if turn == 0:
                fewer = count
            drop, above = count == 0, count > 0
            right = torch.where(drop, limit, right)
            half = torch.where(above == last, 0.5, 1.0) if turn else 1.0
            more, less = torch.where(above, count, more * half), torch.where(above, less * half, count)
            low, high, last = torch.where(above, limit, low), torch.where(above, high, limit), above
            if turn < 2:
                limit = torch.addcmul(limit, limit, count, value=self.slope).clamp(low, high)
            else:
                limit = torch.addcmul(low, high - low, more / (more - less))
            done = right == right
            if int(done.sum()) * 2 >= len(done):
                found.index_copy_(0, live, right)
                stay = (~done).flatten().nonzero().flatten()
                if not stay.numel():
                    break
                left, live, last = left.index_select(0, stay), live[stay], last[stay]
                state = torch.cat([low, high, more, less, limit, right], dim=1).index_select(0, stay)
                low, high, more, less, limit, right = state.split(1, dim=1)
        else:
            found.index_copy_(0, live, right)
        self._learn(first, fewer, found, mean)
        return found

    def _sample(self, scores: Tensor, mean: Tensor) -> None:
        """Share and slope by sorting a few rows."""
        every = max(len(scores) // SAMPLE, 1)
        near = max(min(self.budget, scores.shape[1] - self.budget) // 16, 1)
        best = scores[::every].topk(min(self.budget + near, scores.shape[1]), dim=-1).values
        limit = best[:, self.budget - 1]
        self._know((limit / mean[::every, 0]).nanmedian(), ((limit / best[:, -1]).log() / near).nanmedian())

    def _learn(self, first: Tensor, fewer: Tensor, found: Tensor, mean: Tensor) -> None:
        if int(found.isnan().sum()) * 4 > len(found):
            self.share = torch.nan
        else:
            self._know((found / mean).nanmedian(), ((found / first - 1.0) / fewer).nanmedian())

    def _know(self, share: Tensor, slope: Tensor) -> None:
        self.share = float(share) if bool(share.isfinite()) else 0.0
        self.slope = float(slope) if bool(slope.isfinite()) else 0.0
