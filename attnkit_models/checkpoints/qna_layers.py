"""Single modules of QnA's authors' code, with their inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnkit.blocks import Block
from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.mixes import Mix
from attnkit.primitives import Dense, LearnedQuery, LearnedUpsample, Window
from attnkit_models.checkpoints.family import Layer
from attnkit_models.checkpoints.keys import KeyTable, Section
from attnkit_models.checkpoints.qna import BLOCK, attention_rules, learned_query_rules, mix_section
from attnkit_models.checkpoints.qna_arguments import FusedKQnA, MultiHeadSelfAttention, QnABlock, QnAUpsample, without

# Arguments that only say how training begins.
INITS = ("query_init", "pos_embedding_init", "rpe_init")
# What ports and callers call the scale.
SCALES = ("scale", "scale_factor", "factor", "s", "ratio", "up", "up_factor", "upscale", "upsample", "upsample_factor")


def _width(theirs: Mapping[str, Tensor], name: str, otherwise: int) -> int:
    """Channels of the input, which flax takes from the first input and only the weights tell."""
    kernel = theirs.get(name)
    return kernel.shape[0] if kernel is not None and kernel.ndim == 2 and len(kernel) else otherwise


def fused_qna(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> HeadMix:
    """A mix on maps (B, H, W, C), as theirs."""
    given = FusedKQnA.from_dict(without(hparams, *INITS))
    return _mix(given, given.group(key_bias=given.use_bias), theirs)


def upsampling(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> HeadMix:
    """A mix from maps (B, H, W, C) to finer ones."""
    # No code of the authors has this layer, so none has settled the name of the scale; the queries tell it as well.
    named = [name for name in SCALES if name in hparams]
    given = without(hparams, *INITS, *named)
    query = theirs.get("query")
    counted = 2 if query is None or not query.ndim else max(math.isqrt(len(query)), 1)
    given = QnAUpsample.from_dict({**given, "scale": hparams[named[0]] if named else counted})
    return _mix(given, given.upsampling(), theirs)


def _mix(given: FusedKQnA, group: LearnedQuery | LearnedUpsample, theirs: Mapping[str, Tensor]) -> HeadMix:
    return HeadMix(
        _width(theirs, "Wk", given.features),
        [group],
        head_dim=given.features // given.heads,
        out_dim=given.out_features or given.features,
        qkv_bias=given.use_bias,
        proj_bias=given.use_bias,
    )


def fused_qna_table(mix: nn.Module) -> KeyTable:
    """Names of a `FusedKQnA`, or of one that makes the map finer."""
    group = mix.options[0] if isinstance(mix, HeadMix) else None
    if not isinstance(group, (LearnedQuery, LearnedUpsample)):
        raise KeyError(f"{type(mix).__name__} is no mix of learned queries")
    return KeyTable([Section("", "", learned_query_rules(group))])


def qna_block(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> Block:
    """A block on maps (B, H, W, C), as theirs."""
    given = QnABlock.from_dict(without(hparams, *INITS))
    mix = Mix(
        (given.group(),),
        head_dim=given.features // given.heads,
        out_dim=given.features,
        qkv_bias=False,
        proj_bias=False,
    )
    return Block(
        _width(theirs, "FusedKQnA_0.Wk", given.in_features or given.features),
        mix,
        given.mlp_ratio,
        activation="gelu_tanh",
        layer_scale=given.layer_scale,
        drop_path=given.drop_path,
    )


def qna_block_table(block: nn.Module) -> KeyTable:
    """Names of a block."""
    if not isinstance(block, Block):
        raise KeyError(f"{type(block).__name__} is no block")
    return KeyTable([mix_section(block.config.mix.groups[0], "", ""), Section("", "", BLOCK)])


class WindowTokens(nn.Module):
    """Attention inside windows that were cut before: (windows * B, tokens of a window, C) in and out.

    Args:
        mix: the mix; its group is a `Window` of one window, or `Dense`.
    """

    def __init__(self, mix: HeadMix) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ShapeError(f"this layer takes (windows * B, tokens of a window, C), but got {tuple(x.shape)}")
        group = self.mix.options[0]
        sides = _sides(group) if isinstance(group, Window) else None
        if sides is not None and x.shape[1] != math.prod(sides):
            raise ShapeError(f"a window of {sides[0]} x {sides[1]} holds {math.prod(sides)} tokens, not {x.shape[1]}")
        return self.mix(x, Grid(*(sides or (x.shape[1],))))


def _sides(group: Window) -> tuple[int, ...]:
    return group.window if isinstance(group.window, tuple) else (group.window, group.window)


def window_attention(hparams: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> WindowTokens:
    """Attention among the tokens of windows, (windows * B, tokens, C) as theirs."""
    given = MultiHeadSelfAttention.from_dict(without(hparams, *INITS, "attention_dropout"))
    group = Dense(given.heads)
    if given.use_relative_pe:
        assert given.window_size is not None
        group = Window(given.heads, given.window_size, relative_bias=True)
    mix = HeadMix(
        _width(theirs, "to_qkv.kernel", given.features),
        [group],
        head_dim=given.features // given.heads,
        out_dim=given.output_features or given.features,
        qkv_bias=given.use_bias,
        proj_bias=given.use_bias,
    )
    return WindowTokens(mix)


def window_attention_table(module: nn.Module) -> KeyTable:
    """Names of a `MultiHeadSelfAttention`."""
    if not isinstance(module, WindowTokens):
        raise KeyError(f"{type(module).__name__} is no attention inside windows")
    group = module.mix.options[0]
    sides = _sides(group) if isinstance(group, Window) else None
    return KeyTable([Section("", "mix.", attention_rules(group.heads, sides))])


FUSED_K_QNA = Layer(fused_qna, fused_qna_table)
QNA_UPSAMPLE = Layer(upsampling, fused_qna_table)
QNA_BLOCK = Layer(qna_block, qna_block_table)
MULTI_HEAD_SELF_ATTENTION = Layer(window_attention, window_attention_table)
