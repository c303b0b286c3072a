"""The attention layer of Sparsifiner's authors' code, with its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.checks import check_tensor
from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit_models.backbones.pruning import Tokens, class_weights, kept_count
from attnkit_models.checkpoints.family import Layer
from attnkit_models.checkpoints.keys import KeyTable, Section
from attnkit_models.checkpoints.sparsifiner import attention_rules
from attnkit_models.checkpoints.sparsifiner_arguments import Attention, split


class MaskedTokens(nn.Module):
    """Attention among a class token and so many others: (B, N, C) in and out, and which of the others are left.

    Args:
        mix: the mix.
        tokens: how many tokens it is for, N, the class token included.
        keep: share of the other tokens that are left behind the layer, by the class token's attention; 1 for all.
    """

    def __init__(self, mix: HeadMix, tokens: int, keep: float) -> None:
        super().__init__()
        self.mix = mix
        self.grid = Grid(tokens - 1, prefix=1)
        self.keep = keep

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """(B, N, C), and bool (B, N - 1) or None for which tokens behind the class token are left -> (B, N, C)."""
        return self.mix.run(x, self.grid, token_mask=self._whole(x, token_mask)).x

    def run(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and which tokens are left behind the layer: bool (B, N - 1), or None for all."""
        mask = self._whole(x, token_mask)
        found = self.mix.run(x, self.grid, token_mask=mask, prefix_weights=True)
        if self.keep == 1.0:
            return found.x, None if mask is None else mask[:, 1:]
        tokens = Tokens(found.x, self.grid, mask)
        left = tokens.best(class_weights(found.aux, 1), kept_count(self.keep, self.grid), drop=False).left()
        assert left is not None
        return found.x, left[:, 1:]

    def _whole(self, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """The mask of all tokens, of which the class token is always left."""
        if token_mask is None:
            return None
        check_tensor(token_mask, "token_mask")
        check_tensor(x)
        mask = token_mask[..., 0] if token_mask.ndim == 3 and token_mask.shape[2] == 1 else token_mask
        if x.ndim != 3 or mask.shape != (x.shape[0], x.shape[1] - 1):
            raise ShapeError(
                f"token_mask is (B, N - 1), without the class token, but got {tuple(token_mask.shape)} "
                f"for x {tuple(x.shape)}"
            )
        return torch.cat([mask.new_ones(len(mask), 1), mask], dim=1).bool()


def attention(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> MaskedTokens:
    """The layer, on tokens (B, N, C)."""
    arguments, cfg, _ = split(hparams)
    given = Attention.from_dict(arguments)
    prunes = given.token_pruning_this_layer and not cfg.USE_ATTN_RECON
    mix = given.mix(cfg, given.num_tokens - 1).build(given.dim)
    return MaskedTokens(mix, given.num_tokens, given.token_keep_rate if prunes else 1.0)


def attention_table(module: nn.Module) -> KeyTable:
    """Names of the layer."""
    if not isinstance(module, MaskedTokens):
        raise KeyError(f"{type(module).__name__} is no such layer")
    return KeyTable([Section("", "mix.", attention_rules(None))])


SPARSIFINER_ATTENTION = Layer(attention, attention_table)
