"""TokenMask: the visible pairs as one boolean tensor."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.errors import LayoutError, shown
from attnkit.layouts.base import Layout, form_of
from attnkit.layouts.token_sets import lead_groups


@dataclass(frozen=True, eq=False)
class TokenMask(Layout):
    """Query i sees key j where `mask[..., i, j]` is True.

    Args:
        mask: bool (B or 1, heads or 1, Nq, Nk); a mask of two dimensions serves all items and heads, one of three
            dimensions (heads, Nq, Nk) all items.
        query_groups: int32 or int64 (B or 1, heads or 1, Nq), fewer leading dimensions as in `mask`, or None: a number
            for each query, equal where queries see mostly the same keys; a hint as in `TokenSets`, which changes no
            result.

    Raises:
        LayoutError: for anything but a bool tensor of 2, 3 or 4 dimensions, or groups of another dtype or shape.
    """

    kind: ClassVar[str] = "token_mask"

    mask: Tensor
    query_groups: Tensor | None = field(default=None, kw_only=True)
    key_mask: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        shaped = isinstance(self.mask, Tensor) and self.mask.ndim in (2, 3, 4)
        if not shaped or self.mask.dtype != torch.bool:
            raise LayoutError(f"TokenMask needs a bool tensor (B or 1, heads or 1, Nq, Nk), but got {shown(self.mask)}")
        while self.mask.ndim < 4:
            object.__setattr__(self, "mask", self.mask[None])
        object.__setattr__(self, "query_groups", lead_groups(self.query_groups, self.mask.shape[-2], "TokenMask"))
        super().__post_init__()

    def own_form(self) -> Hashable:
        return form_of(self.mask), form_of(self.query_groups)

    @property
    def own_tables(self) -> tuple[Tensor, ...]:
        return (self.mask,)

    @property
    def hints(self) -> tuple[Tensor, ...]:
        return () if self.query_groups is None else (self.query_groups,)

    @property
    def num_queries(self) -> int:
        return self.mask.shape[-2]

    @property
    def num_keys(self) -> int:
        return self.mask.shape[-1]

    @property
    def key_slots(self) -> int:
        return self.num_keys

    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        return self._masked(self.mask)

    def visible(self) -> Tensor:
        return self.to_mask().sum(-1)
