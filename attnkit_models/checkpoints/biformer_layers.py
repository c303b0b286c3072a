"""Single modules of BiFormer's authors' code, with their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnkit import blocks
from attnkit.checks import check_tensor
from attnkit.errors import ShapeError
from attnkit.heads import HeadMix
from attnkit.mixes import Mix
from attnkit_models.checkpoints.biformer import attention_rules, block_sections
from attnkit_models.checkpoints.biformer_arguments import (
    Attention,
    AttentionLePE,
    BiLevelRoutingAttention,
    Block,
    NchwAttentionLePE,
    NchwBRA,
    without,
)
from attnkit_models.checkpoints.family import Layer
from attnkit_models.checkpoints.keys import KeyTable, Section


class ChannelsFirst(nn.Module):
    """A mix or a block on maps (B, C, H, W) instead of (B, H, W, C).

    Args:
        layer: the mix or block.
    """

    def __init__(self, layer: HeadMix | blocks.Block) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_tensor(x)
        dim = (self.layer.mix if isinstance(self.layer, blocks.Block) else self.layer).dim
        if x.ndim != 4 or x.shape[1] != dim:
            raise ShapeError(f"this layer takes maps (B, {dim}, H, W), but got {tuple(x.shape)}")
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def routed(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> HeadMix:
    """The first code's layer, on maps (B, H, W, C)."""
    given = BiLevelRoutingAttention.from_dict(without(hparams))
    return given.routed.build(given.dim)


def routed_nchw(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> ChannelsFirst:
    """The second code's layer, on maps (B, C, H, W); its `auto_pad` does nothing."""
    given = NchwBRA.from_dict(without(hparams, "auto_pad"))
    return ChannelsFirst(given.mix.build(given.dim))


def dense(
    arguments: type[Attention], hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]
) -> HeadMix | ChannelsFirst:
    """A dense layer, on maps (B, H, W, C), or of the second code, on maps (B, C, H, W)."""
    given = arguments.from_dict(without(hparams))
    mix = given.mix.build(given.dim)
    return ChannelsFirst(mix) if arguments is NchwAttentionLePE else mix


def block(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> ChannelsFirst:
    """The block of `biformer`, on maps (B, C, H, W)."""
    given = Block.from_dict(without(hparams))
    style = {name: value for name, value in given.style.to_dict().items() if name != "kind"}
    return ChannelsFirst(blocks.Block(given.dim, given.mix, **style))


def layer_table(module: nn.Module, *, nchw: bool, kinds: tuple[str, ...]) -> KeyTable:
    """Names of an attention layer."""
    mix = module.layer if nchw and isinstance(module, ChannelsFirst) else module
    if not isinstance(mix, HeadMix) or mix.options[0].kind not in kinds:
        raise KeyError(f"{type(module).__name__} is no such layer")
    rules = attention_rules(Mix(mix.options), nchw=nchw)
    return KeyTable([Section("", "layer." if nchw else "", rules)])


def block_table(module: nn.Module) -> KeyTable:
    """Names of a block."""
    inner = module.layer if isinstance(module, ChannelsFirst) else module
    if not isinstance(inner, blocks.Block):
        raise KeyError(f"{type(module).__name__} is no block")
    return KeyTable(block_sections(inner.config.mix, "", "layer." if inner is not module else ""))


_DENSE = partial(layer_table, nchw=False, kinds=("dense",))

BI_LEVEL_ROUTING_ATTENTION = Layer(routed, partial(layer_table, nchw=False, kinds=("topk_region", "soft_topk_region")))
NCHW_BRA = Layer(routed_nchw, partial(layer_table, nchw=True, kinds=("padded_topk_region", "topk_region")))
ATTENTION = Layer(partial(dense, Attention), _DENSE)
ATTENTION_LEPE = Layer(partial(dense, AttentionLePE), _DENSE)
NCHW_ATTENTION_LEPE = Layer(partial(dense, NchwAttentionLePE), partial(layer_table, nchw=True, kinds=("dense",)))
BLOCK = Layer(block, block_table)
