"""Dense: every query sees every key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import is_count
from attnkit.errors import LayoutError, shown
from attnkit.layouts.base import Layout
from attnkit.layouts.cache import cached_layout


@dataclass(frozen=True, eq=False)
class Dense(Layout):
    """Every query sees every key: `mask[i, j] = True`.

    Args:
        queries: number of queries, Nq >= 0.
        keys: number of keys, Nk >= 0; as many as queries where not given.

    Raises:
        LayoutError: for anything but integers >= 0.
    """

    kind: ClassVar[str] = "dense"

    queries: int
    keys: int | None = None
    key_mask: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not is_count(self.queries) or not is_count(self.num_keys):
            raise LayoutError(
                f"Dense needs numbers of queries and keys, integers >= 0, "
                f"but got {shown(self.queries)} and {shown(self.keys)}"
            )
        super().__post_init__()

    @classmethod
    def square(cls, tokens: int) -> Dense:
        """Every token sees every token; the layout of a number of tokens is made once."""
        return cached_layout(("dense", cls, type(tokens), tokens), lambda: cls(tokens))

    def own_form(self) -> Hashable:
        return self.num_queries, self.num_keys

    @property
    def num_queries(self) -> int:
        return self.queries

    @property
    def num_keys(self) -> int:
        return self.queries if self.keys is None else self.keys

    @property
    def key_slots(self) -> int:
        return self.num_keys

    @property
    def full(self) -> bool:
        return self.key_mask is None

    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        device = device if self.key_mask is None else self.key_mask.device
        return self._masked(torch.ones(1, 1, self.num_queries, self.num_keys, dtype=torch.bool, device=device))

    def visible(self) -> Tensor:
        return self._all_visible(self.num_queries, None)
