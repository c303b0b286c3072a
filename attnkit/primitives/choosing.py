"""Choosing keys by scores of low rank, for some queries at a time, so that memory for scores has a bound.

Beside what is returned (a byte a pair, or four a number of a list), a choice holds what belongs to the scores made at
one time, however many items and heads there are: on the CPU `SCORES` of them, elsewhere `MANY`, or one query's if those
are more. In float32 that is 4 bytes a score, once more for a comparison and again for a mask of a byte; where topk
settles it, 12 bytes for each key of the budget and topk's own sorting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.kernels.ops.registering import exporting
from attnkit.layouts.token_sets import may_look
from attnkit.primitives.highest import Highest

# Scores that are made at one time on the CPU: a step of the search over fewer would take less time than its start.
SCORES = 1 << 21
# Elsewhere, where every operator is started at a cost and nothing of this size stays in a cache.
MANY = 1 << 25


class Guess(NamedTuple):
    """Scores of keys at low rank: few shares of each query times a basis.

    Attributes:
        query: (B, heads, queries, c).
        pooled: (B, heads, c, r); with the queries it gives the logits of which shares are the softmax.
        basis: what each share adds to each key's score, >= 0: (r, keys) or (B, r, keys).
        kept: bool (B, keys), or None; the other keys score -inf.
        scale: factor of the logits.
        coefficients: shares that count, the largest ones, where `least_share` is not given.
        least_share: shares must be above this to count, or None.
    """

    query: Tensor
    pooled: Tensor
    basis: Tensor
    kept: Tensor | None
    scale: float
    coefficients: int
    least_share: float | None

    def scores(self, items: slice, heads: slice, rows: slice, groups: Tensor | None = None) -> Tensor:
        """Scores (items * heads * queries, keys) of some queries of some items.

        The number of each query's largest share is written to `groups`, int32 (items, heads, queries), or nowhere."""
        query, basis = self.query[items, heads, rows], self.basis[items] if self.basis.ndim == 3 else self.basis
        shares = torch.bmm(query.flatten(0, 1), self.pooled[items, heads].flatten(0, 1)) * self.scale
        shares = shares.softmax(-1).view(len(query), -1, shares.shape[-1])
        if self.least_share is not None:
            if groups is not None:
                groups.copy_(shares.argmax(-1).view(groups.shape))
            scores = shares.where(shares > self.least_share, 0.0) @ basis
        else:
            best = shares.topk(min(self.coefficients, shares.shape[-1]), dim=-1, sorted=groups is not None)
            index = best.indices.int()
            if groups is not None:
                groups.copy_(index[..., 0].view(groups.shape))
            if basis.ndim == 3:
                first = torch.arange(0, basis[..., 0].numel(), basis.shape[1], dtype=torch.int32, device=index.device)
                index, basis = index + first[:, None, None], basis.flatten(0, 1)
            # Adds up those rows of the basis, where a product would multiply all of them.
            scores = F.embedding_bag(
                index.flatten(0, 1), basis, mode="sum", per_sample_weights=best.values.flatten(0, 1)
            ).view(*shares.shape[:2], basis.shape[-1])
        if self.kept is not None:
            scores.masked_fill_(~self.kept[items, None], -torch.inf)
        return scores.flatten(0, 1)

    def all_scores(self) -> Tensor:
        """Scores (B, heads, queries, keys) of all queries, by operators that trace."""
        shares = ((self.query @ self.pooled) * self.scale).softmax(-1)
        if self.least_share is not None:
            shares = shares.where(shares > self.least_share, 0.0)
        else:
            best = shares.topk(min(self.coefficients, shares.shape[-1]), dim=-1)
            shares = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
        scores = shares @ (self.basis[:, None] if self.basis.ndim == 3 else self.basis)
        return scores if self.kept is None else scores.masked_fill(~self.kept[:, None, None], -torch.inf)


class Chosen(NamedTuple):
    """The keys of each query.

    Attributes:
        keys: which or their numbers.
        groups: int32 (B, heads, queries), the basis row of which a query has the largest share, -1 for those of a
            prefix: queries of one such row share most of their keys. None on the CPU and in an exported graph, whose
            kernels take queries one by one.
    """

    keys: Tensor
    groups: Tensor | None


def keys_above(guess: Guess, score: float, prefix: tuple[int, int] = (0, 0)) -> Chosen:
    """Which keys score more than a number.

    Args:
        guess: the scores.
        score: the number.
        prefix: how many rows and columns of True stand before those of the guess.

    Returns:
        Keys as bool (B, heads, queries, keys), with the prefix.
    """
    if exporting():
        return Chosen(_framed(guess.all_scores() > score, prefix), None)
    return _chosen(guess, score, 0, None, prefix)


def best_keys(guess: Guess, budget: int, prefix: tuple[int, int] = (0, 0), most: Tensor | None = None) -> Chosen:
    """Which keys score highest, exactly as many as asked for; equal scores are settled arbitrarily.

    Args:
        guess: the scores.
        budget: keys per query, 0..keys.
        prefix: how many rows and columns of True stand before those of the guess.
        most: int64 (B,); an item's own budget where it is smaller.

    Returns:
        Keys as bool (B, heads, queries, keys), with the prefix.
    """
    if exporting():
        index = guess.all_scores().topk(budget, dim=-1).indices
        chosen = torch.ones_like(index, dtype=torch.bool)
        if most is not None:
            chosen = chosen & (torch.arange(budget, device=index.device) < most[:, None, None, None])
        seen = torch.zeros(*index.shape[:3], guess.basis.shape[-1], dtype=torch.bool, device=index.device)
        return Chosen(_framed(seen.scatter(-1, index, chosen), prefix), None)
    return _chosen(guess, None, budget, most, prefix)


def best_lists(guess: Guess, budget: int, first: int = 0) -> Chosen:
    """The same keys as `best_keys`, as lists of numbers.

    Args:
        guess: the scores.
        budget: keys per query, 0..keys.
        first: number of the guess's first key.

    Returns:
        Keys as numbers (B, heads, queries, budget), int32, or int64 in an exported graph.
    """
    if exporting():
        return Chosen(guess.all_scores().topk(budget, dim=-1).indices + first, None)
    function = _list_operator if torch.compiler.is_compiling() else _list
    return _with_groups(guess, function(*guess, budget, first))


def _with_groups(guess: Guess, found: tuple[Tensor, Tensor]) -> Chosen:
    return Chosen(found[0], found[1] if _grouping(guess.query) else None)


def _grouping(query: Tensor) -> bool:
    return query.device.type != "cpu"


def _room_for_groups(query: Tensor, prefix: int = 0) -> Tensor:
    batch, heads, queries = query.shape[:3]
    shape = (batch, heads, prefix + queries if _grouping(query) else 0)
    return torch.full(shape, -1, dtype=torch.int32, device=query.device)


def _rows_of(groups: Tensor, chunk: tuple[slice, slice, slice], prefix: int = 0) -> Tensor | None:
    """Where the groups of some queries go; None where nobody asks for them."""
    items, heads, rows = chunk
    return groups[items, heads, prefix + rows.start : prefix + rows.stop] if groups.shape[-1] else None


def _framed(seen: Tensor, prefix: tuple[int, int]) -> Tensor:
    seen = torch.cat([seen.new_ones(*seen.shape[:-1], prefix[1]), seen], dim=-1)
    return torch.cat([seen.new_ones(*seen.shape[:2], prefix[0], seen.shape[-1]), seen], dim=2)


def _chosen(guess: Guess, score: float | None, budget: int, most: Tensor | None, prefix: tuple[int, int]) -> Chosen:
    function = _choose_operator if torch.compiler.is_compiling() else _choose
    return _with_groups(guess, function(*guess, score, budget, most, *prefix))


def _choose(
    query: Tensor,
    pooled: Tensor,
    basis: Tensor,
    kept: Tensor | None,
    scale: float,
    coefficients: int,
    least_share: float | None,
    score: float | None,
    budget: int,
    most: Tensor | None,
    first_row: int,
    first_column: int,
) -> tuple[Tensor, Tensor]:
    guess = Guess(query, pooled, basis, kept, scale, coefficients, least_share)
    batch, heads, queries = query.shape[:3]
    shape = (batch, heads, first_row + queries, first_column + basis.shape[-1])
    seen = torch.empty(shape, dtype=torch.bool, device=query.device)
    seen[:, :, :first_row].fill_(True)
    seen[..., :first_column].fill_(True)
    groups = _room_for_groups(query, first_row)
    looking = may_look(query)
    budgets = most.clamp(max=budget).tolist() if looking and most is not None else [budget] * batch
    best = {one: Highest(one) for one in budgets}
    for items, some, rows in _chunks(guess):
        part = seen[items, some, first_row + rows.start : first_row + rows.stop, first_column:]
        scores = guess.scores(items, some, rows, _rows_of(groups, (items, some, rows), first_row))
        if score is not None:
            found = torch.gt(scores, score, out=torch.empty_like(scores))
        elif most is None or looking:
            found = best[budgets[items.start]](scores)
        else:
            found = _ranked(scores, budget, most[items])
        # As bytes: from floats to bools PyTorch takes twice as long, and found numbers are 0 or 1.
        part.view(torch.int8).copy_(found.view(part.shape))
    return seen, groups


def _list(
    query: Tensor,
    pooled: Tensor,
    basis: Tensor,
    kept: Tensor | None,
    scale: float,
    coefficients: int,
    least_share: float | None,
    budget: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    guess = Guess(query, pooled, basis, kept, scale, coefficients, least_share)
    index = torch.empty(*query.shape[:3], budget, dtype=torch.int32, device=query.device)
    keys, best, groups = basis.shape[-1], Highest(budget), _room_for_groups(query)
    for items, some, rows in _chunks(guess):
        part = index[items, some, rows]
        scores = guess.scores(items, some, rows, _rows_of(groups, (items, some, rows)))
        if best.sorts(scores):
            part.copy_(scores.topk(budget, dim=-1, sorted=False).indices.view(part.shape))
            continue
        found = best(scores)
        spots = found.flatten().nonzero().view(part.shape)
        part.copy_(spots.sub_(torch.arange(0, found.numel(), keys, device=spots.device).view(*part.shape[:-1], 1)))
    return index.add_(first), groups


def _ranked(scores: Tensor, budget: int, most: Tensor) -> Tensor:
    """Which keys score highest, bool (rows, keys), where only the device knows how many: nothing waits for it.

    Args:
        scores: (rows, keys), as many rows for each item.
        budget: keys per query, at most.
        most: int64 (items,), an item's own budget.
    """
    scores = scores.view(len(most), len(scores) // len(most), scores.shape[-1])
    index = scores.topk(budget, dim=-1).indices
    within = torch.arange(budget, device=index.device) < most[:, None, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, within.expand_as(index))


def _chunks(guess: Guess) -> list[tuple[slice, slice, slice]]:
    """Items, heads and queries: of one item, as each may have a budget of its own, or off the CPU of whole ones."""
    batch, heads, queries = guess.query.shape[:3]
    keys, looking = max(guess.basis.shape[-1], 1), may_look(guess.query)
    limit, pairs = SCORES if looking else MANY, max(queries * keys, 1)
    several = 1 if looking else max(limit // (heads * pairs), 1)
    group = min(max(limit // pairs, 1), heads)
    count = min(max(limit // (group * keys), 1), max(queries, 1))
    return [
        (
            slice(item, min(item + several, batch)),
            slice(head, min(head + group, heads)),
            slice(row, min(row + count, queries)),
        )
        for item in range(0, batch, several)
        for head in range(0, heads, group)
        for row in range(0, queries, count)
    ]


_choose_operator = torch.library.custom_op("attnkit::choose_keys", _choose, mutates_args=())
_list_operator = torch.library.custom_op("attnkit::list_keys", _list, mutates_args=())


@_choose_operator.register_fake
def _(query: Tensor, pooled: Tensor, basis: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    first_row, first_column = rest[-2:]
    shape = (*query.shape[:2], first_row + query.shape[2], first_column + basis.shape[-1])
    return query.new_empty(shape, dtype=torch.bool), _room_for_groups(query, first_row)


@_list_operator.register_fake
def _(query: Tensor, pooled: Tensor, basis: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty((*query.shape[:3], rest[-2]), dtype=torch.int32), _room_for_groups(query)
