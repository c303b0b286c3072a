"""Layout: the interface of every answer to "which keys does a query see?"."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from attnkit.arguments import NamedArguments
from attnkit.errors import LayoutError

Self = TypeVar("Self", bound="Layout")


class Layout(metaclass=NamedArguments):
    """Which keys each query sees; `to_mask()` is the definition, everything else agrees with it.

    Attributes:
        key_mask: bool (B or 1, heads or 1, Nk) or None; keys where it is False are seen by no query.
    """

    _refusal = LayoutError

    kind: ClassVar[str]
    # Every layout declares this as its own last field: older compilers mistake the order of inherited ones.
    key_mask: Tensor | None

    def __post_init__(self) -> None:
        self.lead  # noqa: B018 - raises where the tables do not fit each other

    @property
    def own_tables(self) -> tuple[Tensor, ...]:
        """The tensors a kind of layout holds beside the key mask, each with (B or 1, heads or 1) in front."""
        return ()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All tensors that say which keys are seen, each with (B or 1, heads or 1) in front."""
        return self.own_tables if self.key_mask is None else (*self.own_tables, self.key_mask)

    @property
    def lead(self) -> tuple[int, int]:
        """Over how many items and heads the layout varies, (B or 1, heads or 1).

        Raises:
            LayoutError: if one of its tables varies over other numbers than another.
        """
        return common_lead(f"a {self.kind} layout", *(tuple(table.shape[:2]) for table in self.tables))

    @property
    @abstractmethod
    def num_queries(self) -> int:
        """Number of queries, Nq."""

    @property
    @abstractmethod
    def num_keys(self) -> int:
        """Number of keys, Nk."""

    @property
    def global_queries(self) -> int:
        """How many of the first queries see every key (prefix tokens)."""
        return 0

    @property
    def global_keys(self) -> int:
        """How many of the first keys are seen by every query (prefix tokens)."""
        return 0

    @property
    def full(self) -> bool:
        """Whether every query surely sees every key, known without looking at any tensor's values."""
        return False

    @abstractmethod
    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        """Returns the meaning: bool, broadcastable to (B, heads, Nq, Nk), True where the query sees the key.

        Args:
            device: where to make the mask of a layout that holds no tensor; the others stay on their own device.
        """

    @abstractmethod
    def visible(self) -> Tensor:
        """Returns how many keys each query sees: int64 (B or 1, heads or 1, Nq), without an Nq x Nk intermediate
        unless the layout itself holds one."""

    @property
    @abstractmethod
    def key_slots(self) -> int:
        """Keys that a query outside the prefix can see at most; known without looking at any tensor's values."""

    def pairs(self, batch: int = 1, heads: int = 1) -> int:
        """Number of visible (query, key) pairs over `batch` items and `heads` heads.

        Raises:
            LayoutError: if the layout varies over another number of items or heads.
        """
        counts = self.visible()
        for axis, (name, size) in enumerate((("batch", batch), ("heads", heads))):
            if counts.shape[axis] not in (1, size):
                raise LayoutError(
                    f"this layout varies over {name}={counts.shape[axis]} but pairs({name}={size}) was asked"
                )
        return int(counts.expand(batch, heads, -1).sum())

    def density(self) -> float:
        """Fraction of all query-key pairs that are visible, 0..1; 1.0 where there are no pairs at all."""
        counts = self.visible()
        total = counts.numel() * self.num_keys
        return float(counts.sum()) / total if total else 1.0

    def flops(self, head_dim: int, value_dim: int | None = None, *, batch: int = 1, heads: int = 1) -> int:
        """Multiply-adds of attention over the visible pairs: pairs * (head_dim + value_dim).

        Args:
            head_dim: width of queries and keys per head, D.
            value_dim: width of values per head; `head_dim` where not given.
            batch: number of images.
            heads: number of heads.

        Returns:
            MACs (one multiply-add counts once); softmax itself is not counted.
        """
        return self.pairs(batch, heads) * (head_dim + (head_dim if value_dim is None else value_dim))

    def restrict(self: Self, keys: Tensor) -> Self:
        """The same layout in which only some keys are left.

        Args:
            keys: bool (Nk,), (B, Nk) or (B or 1, heads or 1, Nk); True keeps a key.

        Raises:
            LayoutError: for another dtype or number of keys, or keys that vary over other items or heads.
        """
        if keys.dtype != torch.bool or keys.ndim not in (1, 2, 3) or keys.shape[-1] != self.num_keys:
            raise LayoutError(
                f"restrict needs a bool tensor (Nk,), (B, Nk) or (B, heads, Nk) with Nk = {self.num_keys}, "
                f"but got {keys.dtype} {tuple(keys.shape)}"
            )
        keys = keys.view(1, 1, -1) if keys.ndim == 1 else keys[:, None] if keys.ndim == 2 else keys
        common_lead(f"a {self.kind} layout and the keys it is restricted to", self.lead, tuple(keys.shape[:2]))
        left = keys if self.key_mask is None else self.key_mask & keys
        return dataclasses.replace(self, key_mask=left)  # type: ignore[type-var]

    def lower(self, kind: str) -> Layout:
        """Writes the same meaning as a more general kind: `"token_sets"` or `"token_mask"`.

        Raises:
            LayoutError: if `kind` cannot hold this layout.
        """
        from attnkit.layouts.lowering import lower

        return lower(self, kind)

    def _masked(self, mask: Tensor) -> Tensor:
        return mask if self.key_mask is None else mask & self.key_mask[:, :, None, :]

    def _all_visible(self, queries: int, like: Tensor | None) -> Tensor:
        """Counts for queries that see every key that is not masked."""
        if self.key_mask is not None:
            return self.key_mask.sum(-1)[..., None].expand(-1, -1, queries)
        device = None if like is None else like.device
        return torch.full((1, 1, queries), self.num_keys, dtype=torch.int64, device=device)


def common_lead(what: str, *leads: tuple[int, ...]) -> tuple[int, int]:
    """The numbers of items and heads to which several (B or 1, heads or 1) broadcast.

    Raises:
        LayoutError: if they do not, with `what` as the subject of the sentence.
    """
    found = [1, 1]
    for lead in leads:
        for axis, size in enumerate(lead):
            if size != 1 and found[axis] not in (1, size):
                listed = " and ".join(str(tuple(one)) for one in leads)
                raise LayoutError(f"{what} must vary over the same (items, heads) or over one, but got {listed}")
            if size != 1:
                found[axis] = size
    return found[0], found[1]


def framed(inner: Tensor, global_queries: int, global_keys: int) -> Tensor:
    """Puts rows and columns of True before a mask of shape (..., Nq, Nk), for tokens that see and are seen by all."""
    if global_keys:
        inner = torch.cat([inner.new_ones((*inner.shape[:-1], global_keys)), inner], dim=-1)
    if global_queries:
        inner = torch.cat([inner.new_ones((*inner.shape[:-2], global_queries, inner.shape[-1])), inner], dim=-2)
    return inner
