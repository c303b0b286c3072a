"""QnA-ViT's authors' names: the paths of a flax parameter tree, joined by dots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from attnkit.primitives import LearnedQuery, LearnedUpsample, PrimitiveOptions, Window
from attnkit_models.backbones import PyramidConfig
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.checkpoints.family import Family
from attnkit_models.checkpoints.keys import CHANNELS_FIRST, TRANSPOSED, KeyTable, Rule, Section, Transform
from attnkit_models.checkpoints.qna_arguments import qna_config

# A convolution of one pixel, (1, 1, in, out), that is a linear layer of ours.
PIXEL = Transform(lambda tensor: tensor[0, 0].t(), lambda tensor: tensor.t()[None, None])


def _square(table: Tensor) -> Tensor:
    """(places, rows) -> (rows, side, side)."""
    side = math.isqrt(len(table))
    return table.t().unflatten(1, (side, side))


# Tables over the window's places, row-major, with queries and heads behind: (k * k, rows) and (1, 1, k * k, rows).
TABLE = Transform(_square, lambda tensor: tensor.flatten(1).t())
GAIN_TABLE = Transform(lambda tensor: _square(tensor[0, 0]), lambda tensor: tensor.flatten(1).t()[None, None])
ELEMENTWISE = Transform(lambda tensor: tensor[0, 0, 0], lambda tensor: tensor[None, None, None])


def learned_query_rules(group: LearnedQuery | LearnedUpsample) -> tuple[Rule, ...]:
    """Names inside a `FusedKQnA`."""
    heads, queries = group.heads, group.count
    # One factor per place, query and head: (1, 1, k * k, queries, heads).
    ones = Transform(
        lambda tensor: _square(tensor[0, 0].flatten(1)),
        lambda tensor: tensor.flatten(1).t().unflatten(1, (queries, heads))[None, None],
    )
    gains = {
        "window": Rule("attn_scale_weights", "groups.0.gain", GAIN_TABLE),
        "query": Rule("attn_scale_weights", "groups.0.gain", ELEMENTWISE),
        "window_ones": Rule("attn_scale_pos", "groups.0.gain", ones),
    }
    return (
        Rule("query", "groups.0.query", Transform(lambda tensor: tensor.unflatten(1, (heads, -1)), _joined)),
        Rule("Wk", "groups.0.key", TRANSPOSED),
        Rule("Wk_b", "groups.0.key_bias"),
        Rule("rpe_bias", "groups.0.relative_bias", TABLE),
        *((gains[group.gain],) if group.gain in gains else ()),
        Rule("to_v.kernel", "qkv.weight", TRANSPOSED),
        Rule("to_v.bias", "qkv.bias"),
        Rule("to_out.kernel", "proj.weight", TRANSPOSED),
        Rule("to_out.bias", "proj.bias"),
    )


def _joined(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def attention_rules(heads: int, sides: tuple[int, ...] | None) -> tuple[Rule, ...]:
    """Names inside a `MultiHeadSelfAttention`.

    Args:
        heads: number of heads.
        sides: height and width of the window in tokens, or None without a relative bias.
    """
    # Their projection gives each head its q, k and v side by side; ours gives q of all heads, then k, then v.
    weight = Transform(
        lambda tensor: tensor.t().unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2),
        lambda tensor: tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2).t(),
    )
    bias = Transform(
        lambda tensor: tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(),
        lambda tensor: tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(),
    )
    rules = [
        Rule("to_qkv.kernel", "qkv.weight", weight),
        Rule("to_qkv.bias", "qkv.bias", bias),
        Rule("to_out.kernel", "proj.weight", TRANSPOSED),
        Rule("to_out.bias", "proj.bias"),
    ]
    if sides is not None:
        table = _offsets([2 * side - 1 for side in sides])
        rules.append(Rule("RelativePositionalEmbedding_0.rpe_bias", "groups.0.relative_bias", table))
    return tuple(rules)


def _offsets(extents: Sequence[int]) -> Transform:
    """Tables over offsets in windows; of other windows than ours, square ones."""

    def inward(table: Tensor) -> Tensor:
        fits = len(table) == math.prod(extents)
        # Their offsets run from key to query, ours from query to key.
        return (table.t().unflatten(1, extents) if fits else _square(table)).flip(1, 2)

    return Transform(inward, lambda table: table.flip(1, 2).flatten(1).t())


def mix_section(group: PrimitiveOptions, theirs: str, ours: str) -> Section:
    """Names inside the mix of a block."""
    if isinstance(group, LearnedQuery):
        return Section(f"{theirs}FusedKQnA_0.", f"{ours}mix.", learned_query_rules(group))
    if not isinstance(group, Window) or isinstance(group.window, tuple):
        raise KeyError(f"{group.kind!r} has no counterpart")
    sides = (group.window, group.window) if group.relative_bias else None
    return Section(f"{theirs}MultiHeadSelfAttention_0.", f"{ours}mix.", attention_rules(group.heads, sides))


def norm_rules(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Names of a layer norm."""
    return (Rule(f"{theirs}.scale", f"{ours}.weight"), Rule(f"{theirs}.bias", f"{ours}.bias"))


BLOCK = (
    *norm_rules("LayerNorm_0", "norm1"),
    *norm_rules("LayerNorm_1", "norm2"),
    Rule("Conv_0.kernel", "shortcut.weight", PIXEL),
    Rule("MlpBlock_0.Dense_0.kernel", "mlp.fc1.weight", TRANSPOSED),
    Rule("MlpBlock_0.Dense_0.bias", "mlp.fc1.bias"),
    Rule("MlpBlock_0.Dense_1.kernel", "mlp.fc2.weight", TRANSPOSED),
    Rule("MlpBlock_0.Dense_1.bias", "mlp.fc2.bias"),
    Rule("LayerScale_0.scale_param", "scale1"),
    Rule("LayerScale_1.scale_param", "scale2"),
)


def qna_table(config: ModelConfig) -> KeyTable:
    """Names of a whole model."""
    if not isinstance(config, PyramidConfig):
        raise KeyError(f"it is of kind {config.kind!r} and not a pyramid")
    sections = [Section("StemBlock_0.conv_1x1.", "stem.0.conv.", (Rule("kernel", "weight", CHANNELS_FIRST),))]
    for theirs, ours, group in _blocks(config):
        sections += [mix_section(group, theirs, ours), Section(theirs, ours, BLOCK)]
    head = (
        *norm_rules("LayerNorm_0", "norm"),
        Rule("head_logits.kernel", "head.weight", TRANSPOSED),
        Rule("head_logits.bias", "head.bias"),
    )
    return KeyTable([*sections, Section("ClassificationHead_0.", "", head)])


def _blocks(config: PyramidConfig) -> Iterator[tuple[str, str, PrimitiveOptions]]:
    """Their prefix, our prefix and the head group of every block."""
    level, count = 0, 0
    for at, stage in enumerate(config.stages):
        group = stage.mix.groups[0]
        for inner in range(stage.depth):
            ours = f"stages.{at}.blocks.{inner}."
            if not isinstance(group, LearnedQuery):
                yield f"LSAStage_{level}.MSA_Block_{inner + 1}.", ours, group
                continue
            count += 1
            strided = f"_stride_{group.stride}" if group.stride > 1 else ""
            yield f"QnAStage_{level}.QnA_Block_{count}{strided}.", ours, group
        if stage.mix.output_stride > 1:
            level, count = level + 1, 0


QNA_VIT = Family("qna_vit", qna_config, qna_table, r"QnAStage_\d+\.QnA_Block_\d+(_stride_2)?\.FusedKQnA_0\.Wk")
