"""TokenSets: a list of visible keys for every query."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import is_count
from attnkit.errors import LayoutError, shown
from attnkit.layouts.base import Layout, form_of, framed


@dataclass(frozen=True, eq=False)
class TokenSets(Layout):
    """Query i sees the keys listed in `index[..., i, :]`; -1 stands for no key, a repeated key counts once.

    Args:
        index: int32 or int64 (B or 1, heads or 1, Nq - queries_all, K), keys 0..Nk-1 or -1; fewer leading dimensions
            serve all items and heads. It is kept as it is.
        keys: number of keys, Nk.
        queries_all: how many queries stand before the listed ones and see every key.
        keys_all: how many of the first keys every query sees, listed or not.
        query_groups: int32 or int64 (B or 1, heads or 1, Nq - queries_all), fewer leading dimensions as in `index`, or
            None: a number for each listed query, equal where queries see mostly the same keys. A hint, which changes
            no result but for rounding: kernels that compute many queries at once take those of a group together.

    Raises:
        LayoutError: for another dtype or rank, a number below 0, groups of another shape, or an entry outside
            -1..Nk-1 (looked at on the CPU only).
    """

    kind: ClassVar[str] = "token_sets"

    index: Tensor
    keys: int
    queries_all: int = field(default=0, kw_only=True)
    keys_all: int = field(default=0, kw_only=True)
    query_groups: Tensor | None = field(default=None, kw_only=True)
    unique: bool = field(default=False, kw_only=True, repr=False)
    key_mask: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        index = self.index
        shaped = isinstance(index, Tensor) and index.ndim in (2, 3, 4)
        if not shaped or index.dtype not in (torch.int64, torch.int32):
            raise LayoutError(f"TokenSets needs an integer tensor (B or 1, heads or 1, Nq, K), but got {shown(index)}")
        for name in ("keys", "queries_all", "keys_all"):
            if not is_count(getattr(self, name)):
                raise LayoutError(f"TokenSets needs an integer >= 0 as {name}, but got {shown(getattr(self, name))}")
        if self.keys_all > self.keys:
            raise LayoutError(f"TokenSets(keys_all={self.keys_all}): must be <= keys={self.keys}")
        while index.ndim < 4:
            index = index[None]
        if not self.unique:
            check_range(index, self.keys, "TokenSets.index", "keys")
            index = without_repeats(index, self.keys_all)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "unique", True)
        object.__setattr__(self, "query_groups", lead_groups(self.query_groups, index.shape[-2], "TokenSets"))
        super().__post_init__()

    def own_form(self) -> Hashable:
        return form_of(self.index), self.keys, self.queries_all, self.keys_all, form_of(self.query_groups)

    @property
    def own_tables(self) -> tuple[Tensor, ...]:
        return (self.index,)

    @property
    def hints(self) -> tuple[Tensor, ...]:
        return () if self.query_groups is None else (self.query_groups,)

    @property
    def num_queries(self) -> int:
        return self.queries_all + self.index.shape[-2]

    @property
    def num_keys(self) -> int:
        return self.keys

    @property
    def global_queries(self) -> int:
        return self.queries_all

    @property
    def global_keys(self) -> int:
        return self.keys_all

    @property
    def key_slots(self) -> int:
        return self.keys_all + self.index.shape[-1]

    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        spots = torch.where(self.index < 0, self.keys, self.index).long()
        mask = torch.zeros((*spots.shape[:-1], self.keys + 1), dtype=torch.bool, device=spots.device)
        mask = mask.scatter(-1, spots, torch.ones((), dtype=torch.bool, device=spots.device).expand_as(spots))
        inner = mask[..., self.keys_all : self.keys]
        return self._masked(framed(inner, self.queries_all, self.keys_all))

    def visible(self) -> Tensor:
        valid = self.index >= 0
        count = valid.sum(-1) + self.keys_all
        if self.key_mask is not None:
            kept = gathered_keys(self.key_mask, self.index) & valid
            count = kept.sum(-1) + self.key_mask[..., : self.keys_all].sum(-1)[..., None]
        everything = self._all_visible(self.queries_all, self.index)
        shape = torch.broadcast_shapes(count.shape[:2], everything.shape[:2])
        return torch.cat([everything.expand(*shape, -1), count.expand(*shape, -1)], dim=-1)


def check_range(index: Tensor, bound: int, what: str, of: str) -> None:
    """Raises `LayoutError` for entries outside -1..bound-1. Not on GPUs nor in a graph, where looking would stall."""
    if not may_look(index) or not index.numel():
        return
    low, high = torch.aminmax(index)
    if int(low) < -1 or int(high) >= bound:
        raise LayoutError(
            f"{what} must hold numbers of {of} in 0..{bound - 1}, or -1 for none, but holds {int(low)}..{int(high)}"
        )


def may_look(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at for free: not on GPUs, nor in a graph, nor where there are none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def lead_groups(groups: Tensor | None, queries: int, what: str) -> Tensor | None:
    """Numbers of groups with all leading dimensions.

    Args:
        groups: as a layout is given them.
        queries: how many queries have a number.
        what: the layout, for the message.

    Raises:
        LayoutError: for another dtype, rank or number of queries.
    """
    if groups is None:
        return None
    shaped = isinstance(groups, Tensor) and groups.ndim in (1, 2, 3) and groups.shape[-1] == queries
    if not shaped or groups.dtype not in (torch.int64, torch.int32):
        raise LayoutError(
            f"{what} needs query_groups as an int32 or int64 tensor (B or 1, heads or 1, {queries}), a number for each "
            f"query{' that has a list' * (what == 'TokenSets')}, "
            f"but got {shown(groups)}"
        )
    return groups.view(*(1,) * (3 - groups.ndim), *groups.shape)


def without_repeats(index: Tensor, known: int = 0) -> Tensor:
    """Sorts the last dimension and replaces repeated entries, and those below `known`, by -1."""
    index = index.sort(dim=-1).values
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[..., 1:] = index[..., 1:] == index[..., :-1]
    return torch.where(repeated | (index < known), -1, index)


def gathered_keys(key_mask: Tensor, index: Tensor) -> Tensor:
    """Looks up a (B or 1, heads or 1, Nk) mask at an index (B or 1, heads or 1, ..., K); -1 looks up key 0."""
    shape = torch.broadcast_shapes(key_mask.shape[:2], index.shape[:2])
    spots = index.clamp(min=0).long().expand(*shape, *index.shape[2:])
    return key_mask.expand(*shape, -1).gather(-1, spots.flatten(2)).view(spots.shape)
