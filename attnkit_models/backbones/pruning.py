"""Token pruning: fewer and fewer tokens from block to block, as data that the blocks hand on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.errors import ConfigError
from attnkit.grid import Grid


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens on their way through the blocks, some of which may be gone: masked, or dropped from the tensor.

    Attributes:
        x: (B, n, C); masked tokens are zero.
        grid: how all tokens lie, those that are gone too.
        token_mask: bool (B, N), False for tokens that are gone, or None where nothing is masked.
        places: int64 (B, n), the numbers of the tokens that are left, or None where none are dropped.
    """

    x: Tensor
    grid: Grid
    token_mask: Tensor | None = None
    places: Tensor | None = None

    def whole(self) -> Tensor:
        """All tokens of the grid (B, N, C); those that are gone are zero."""
        if self.places is None:
            return self.x
        spots = self.places[..., None].expand(-1, -1, self.x.shape[2])
        return self.x.new_zeros(self.x.shape[0], self.grid.tokens, self.x.shape[2]).scatter(1, spots, self.x)

    def left(self) -> Tensor | None:
        """Which tokens are left: bool (B, N), or None for all."""
        if self.places is None:
            return self.token_mask
        gone = torch.zeros(self.x.shape[0], self.grid.tokens, dtype=torch.bool, device=self.x.device)
        return gone.scatter(1, self.places, True)

    def best(self, weights: Tensor, count: int, *, drop: bool) -> Tokens:
        """The image tokens with the largest weights, and all prefix tokens.

        Args:
            weights: (B, image tokens of x).
            count: how many image tokens stay.
            drop: whether the others are dropped; else they are masked.
        """
        prefix = self.grid.prefix
        if drop:
            index = weights.topk(count, dim=1).indices.sort(dim=1).values + prefix
            index = torch.cat([torch.arange(prefix, device=index.device).expand(len(index), -1), index], dim=1)
            places = index if self.places is None else self.places.gather(1, index)
            x = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[2]))
            return Tokens(x, self.grid, None, places)
        if self.token_mask is not None:
            weights = weights.masked_fill(~self.token_mask[:, prefix:], -torch.inf)
        mask = torch.zeros_like(weights, dtype=torch.bool).scatter(1, weights.topk(count, dim=1).indices, True)
        mask = torch.cat([mask.new_ones(len(mask), prefix), mask], dim=1)
        return Tokens(self.x.where(mask[..., None], 0.0), self.grid, mask)


def kept_count(keep: float, grid: Grid) -> int:
    """Image tokens that stay: the share `keep` of them, rounded up, at least one."""
    # 0.07 * 100 is a little more than 7.
    return max(math.ceil(round(keep * grid.image_tokens, 6)), 1)


def class_weights(aux: Mapping[str, Tensor], prefix: int) -> Tensor:
    """How much of the class token's attention each image token gets, mean over all heads: (B, image tokens).

    Raises:
        ConfigError: if no group of the mix has softmax.
    """
    found = [one for name, one in aux.items() if name.endswith(".prefix_weights")]
    if not found:
        raise ConfigError("keep_tokens=... chooses by the class token's attention, but no group of the mix has any")
    return torch.cat(found, dim=1)[:, :, 0, prefix:].mean(1)


def share_problems(keep_tokens: tuple[float, ...], depth: int) -> list[str]:
    """Problems for the shares of tokens that the blocks hand on."""
    shown = f"keep_tokens={list(keep_tokens)}"
    if keep_tokens and len(keep_tokens) != depth:
        return [f"{shown}: needs one share for each of {depth} blocks, or none at all"]
    if not all(0 < keep <= 1 for keep in keep_tokens):
        return [f"{shown}: shares must be in (0, 1]"]
    if any(after > before for before, after in itertools.pairwise(keep_tokens)):
        return [f"{shown}: tokens that are gone do not come back, so shares must not grow"]
    return []
