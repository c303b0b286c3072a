"""Layout: the interface of every answer to "which keys does a query see?"."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Hashable
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from attnkit.arguments import NamedArguments, is_count
from attnkit.errors import LayoutError, shown

Self = TypeVar("Self", bound="Layout")


class Layout(metaclass=NamedArguments):
    """Which keys each query sees; `to_mask()` is the definition, everything else agrees with it.

    Attributes:
        key_mask: bool (B or 1, heads or 1, Nk) or None; keys where it is False are seen by no query.
    """

    _refusal = LayoutError

    kind: ClassVar[str]
    # What a layout that depends on sizes only is remembered by, set where it is made once; None for all others.
    made_of: ClassVar[Hashable | None] = None
    # Every layout declares this as its own last field: older compilers mistake the order of inherited ones.
    key_mask: Tensor | None

    def __post_init__(self) -> None:
        mask = self.key_mask
        if mask is not None:
            shaped = isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape[-1] == self.num_keys
            if not shaped or mask.dtype != torch.bool:
                raise LayoutError(
                    f"key_mask is a bool tensor (B or 1, heads or 1, Nk) with Nk = {self.num_keys}, "
                    f"but got {shown(mask)}; layout.restrict(keys) takes more forms"
                )
        # Raises where the tables do not fit each other.
        common_lead(f"a {self.kind} layout", self.lead, *(tuple(one.shape[:2]) for one in self.hints))

    @cached_property
    def signature(self) -> Hashable | None:
        """All that a backend may look at beforehand, sizes and devices but no values: layouts whose signatures are
        equal get the same backend. None for kinds without an `own_form`, whose backend is chosen anew for every call.
        """
        # A subclass may hold more than the kind it comes from tells.
        if "own_form" not in vars(type(self)):
            return None
        return type(self), self.own_form(), form_of(self.key_mask)

    def __getstate__(self) -> dict[str, Any]:
        # Unpickled tensors may lie on another device than these say.
        return {name: value for name, value in vars(self).items() if name not in ("signature", "made_of")}

    def own_form(self) -> Hashable:
        """The part of `signature` beside the key mask: all fields, and for tensors their `form_of`."""
        return None

    @property
    def own_tables(self) -> tuple[Tensor, ...]:
        """The tensors a kind of layout holds beside the key mask, each with (B or 1, heads or 1) in front."""
        return ()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All tensors that say which keys are seen, each with (B or 1, heads or 1) in front."""
        return self.own_tables if self.key_mask is None else (*self.own_tables, self.key_mask)

    @property
    def hints(self) -> tuple[Tensor, ...]:
        """Tensors that help backends and change no mask, each with (B or 1, heads or 1) in front."""
        return ()

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

    def pairs(self, batch: int | None = None, heads: int | None = None) -> int:
        """Number of visible (query, key) pairs over `batch` items and `heads` heads.

        Args:
            batch: number of items; as many as the layout varies over where not given.
            heads: number of heads; as many as the layout varies over where not given.

        Raises:
            LayoutError: if the layout varies over another number of items or heads, or is on the meta device.
        """
        counts = self.visible()
        if counts.is_meta:
            raise LayoutError(
                f"the tables of this {self.kind} layout are on the meta device, which has no numbers to count; "
                f"put the module on the CPU"
            )
        pairs = int(counts.sum())
        for name, own, size in (("batch", counts.shape[0], batch), ("heads", counts.shape[1], heads)):
            if size is not None and not is_count(size):
                raise LayoutError(f"{name} is an integer >= 0, or None for the layout's own, but got {shown(size)}")
            if own not in (1, own if size is None else size):
                raise LayoutError(f"this layout varies over {name}={own}, but pairs over {name}={size} were asked for")
            pairs *= 1 if size in (None, own) else size
        return pairs

    def density(self) -> float:
        """Fraction of all query-key pairs that are visible, 0..1; 1.0 where there are no pairs at all."""
        counts = self.visible()
        total = counts.numel() * self.num_keys
        return float(counts.sum()) / total if total else 1.0

    def flops(
        self, head_dim: int, value_dim: int | None = None, *, batch: int | None = None, heads: int | None = None
    ) -> int:
        """Multiply-adds of attention over the visible pairs: pairs * (head_dim + value_dim).

        Args:
            head_dim: width of queries and keys per head, D >= 1.
            value_dim: width of values per head, >= 1; `head_dim` where not given.
            batch: number of items; as many as the layout varies over where not given.
            heads: number of heads; as many as the layout varies over where not given.

        Returns:
            MACs (one multiply-add counts once); softmax itself is not counted.

        Raises:
            LayoutError: for a width below 1, or if the layout varies over another number of items or heads.
        """
        widths = (head_dim, head_dim if value_dim is None else value_dim)
        for name, width in zip(("head_dim", "value_dim"), widths, strict=True):
            if not is_count(width, 1):
                raise LayoutError(f"{name} is a width, an integer >= 1, but got {shown(width)}")
        return self.pairs(batch, heads) * sum(widths)

    def restrict(self: Self, keys: Tensor) -> Self:
        """The same layout in which only some keys are left.

        Args:
            keys: bool (Nk,), (B, Nk) or (B or 1, heads or 1, Nk); True keeps a key.

        Raises:
            LayoutError: for another dtype or number of keys, or keys that vary over other items or heads.
        """
        shaped = isinstance(keys, Tensor) and keys.ndim in (1, 2, 3) and keys.shape[-1] == self.num_keys
        if not shaped or keys.dtype != torch.bool:
            raise LayoutError(
                f"restrict needs a bool tensor (Nk,), (B, Nk) or (B, heads, Nk) with Nk = {self.num_keys}, "
                f"but got {shown(keys)}"
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


def form_of(tensor: Tensor | None) -> Hashable:
    """What can be known of a tensor without looking at its values."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def framed(inner: Tensor, global_queries: int, global_keys: int) -> Tensor:
    """Puts rows and columns of True before a mask of shape (..., Nq, Nk), for tokens that see and are seen by all."""
    if global_keys:
        inner = torch.cat([inner.new_ones((*inner.shape[:-1], global_keys)), inner], dim=-1)
    if global_queries:
        inner = torch.cat([inner.new_ones((*inner.shape[:-2], global_queries, inner.shape[-1])), inner], dim=-2)
    return inner
