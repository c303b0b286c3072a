"""BiFormer's authors' names: the three codes `biformer`, `biformer_stl` and `biformer_stl_nchw`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from attnkit.mixes import Mix
from attnkit.primitives import PaddedTopKRegion, TopKRegion
from attnkit_models.backbones import PyramidConfig
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.checkpoints.biformer_models import BiFormer, BiFormerSTL, NchwBiFormerSTL, configuration
from attnkit_models.checkpoints.family import Family
from attnkit_models.checkpoints.keys import POINTWISE, KeyTable, Rule, Section

_ALL = (Rule("*", "*"),)


def _pointwise(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A linear layer of ours that is a convolution of one pixel of theirs."""
    return Rule(f"{theirs}.weight", f"{ours}.weight", POINTWISE), Rule(f"{theirs}.bias", f"{ours}.bias")


# Names inside an attention layer.
LEPE = Rule("lepe.*", "groups.0.lepe.*")
ROUTED = (
    Rule("qkv.qkv.*", "qkv.*"),
    Rule("wo.*", "proj.*"),
    LEPE,
    Rule("router.emb.*", "groups.0.router.*"),
)
ROUTED_NCHW = (*_pointwise("qkv_linear", "qkv"), *_pointwise("output_linear", "proj"), LEPE)
DENSE = (Rule("qkv.*", "qkv.*"), Rule("proj.*", "proj.*"), LEPE)
DENSE_NCHW = (*_pointwise("qkv", "qkv"), *_pointwise("proj", "proj"), LEPE)
CONVOLUTIONS = (*_pointwise("1", "qkv"), Rule("2.*", "groups.0.depthwise.*"), *_pointwise("3", "proj"))

NORMS = (Rule("norm1.*", "norm1.*"), Rule("norm2.*", "norm2.*"))
MLP = (Rule("mlp.0.*", "mlp.fc1.*"), Rule("mlp.2.*", "mlp.fc2.*"))
MLP_NCHW = (*_pointwise("mlp.0", "mlp.fc1"), *_pointwise("mlp.2", "mlp.fc2"))
TAIL = Section("", "", (Rule("norm.*", "norm.*"), Rule("head.*", "head.*")))

# Their MLP keeps a place for the convolution; their STL blocks have neither that nor the rest.
BLOCK = (
    Rule("pos_embed.*", "position_conv.*"),
    *NORMS,
    Rule("mlp.0.*", "mlp.fc1.*"),
    Rule("mlp.1.dwconv.*", "mlp.conv.*"),
    Rule("mlp.3.*", "mlp.fc2.*"),
    Rule("gamma1", "scale1"),
    Rule("gamma2", "scale2"),
)


def attention_rules(mix: Mix, *, nchw: bool = False) -> tuple[Rule, ...]:
    """Names inside the attention layer that a mix stands for.

    Raises:
        KeyError: if it stands for none.
    """
    group = mix.groups[0]
    known = {"dense": DENSE_NCHW, "topk_region": ROUTED_NCHW, "padded_topk_region": ROUTED_NCHW}
    if not nchw:
        known = {"dense": DENSE, "topk_region": ROUTED, "soft_topk_region": ROUTED, "conv": CONVOLUTIONS}
    if len(mix.groups) != 1 or group.kind not in known:
        raise KeyError(f"a mix of {', '.join(one.kind for one in mix.groups)} has no counterpart")
    return known[group.kind]


def block_sections(mix: Mix, theirs: str, ours: str) -> list[Section]:
    """Names inside a block of `biformer`."""
    return [Section(f"{theirs}attn.", f"{ours}mix.", attention_rules(mix)), Section(theirs, ours, BLOCK)]


def biformer_table(config: ModelConfig) -> KeyTable:
    """Names of `biformer`: norms behind the convolutions, a position convolution in every block."""
    config = _pyramid(config)
    sections = [
        Section("downsample_layers.0.0.", "stem.0.conv.", _ALL),
        Section("downsample_layers.0.1.", "stem.0.norm.", _ALL),
        Section("downsample_layers.0.3.", "stem.1.conv.", _ALL),
        Section("downsample_layers.0.4.", "stem.1.norm.", _ALL),
    ]
    for at in range(1, len(config.stages)):
        sections.append(Section(f"downsample_layers.{at}.0.", f"stages.{at}.merge.conv.", _ALL))
        sections.append(Section(f"downsample_layers.{at}.1.", f"stages.{at}.merge.norm.", _ALL))
    for at, inner, mix in _blocks(config):
        sections += block_sections(mix, f"stages.{at}.{inner}.", f"stages.{at}.blocks.{inner}.")
    return KeyTable([*sections, TAIL])


def stl_table(config: ModelConfig, *, nchw: bool = False) -> KeyTable:
    """Names of `biformer_stl`: norms before the convolutions; in `nchw`, linear layers are convolutions."""
    config = _pyramid(config)
    sections = [
        Section("downsample_layers.0.0.", "stem.0.conv.", _ALL),
        Section("downsample_layers.0.1.", "stem.0.norm.", _ALL),
    ]
    for at in range(1, len(config.stages)):
        sections.append(Section(f"downsample_layers.{at}.0.", f"stages.{at}.merge.norm.", _ALL))
        sections.append(Section(f"downsample_layers.{at}.1.", f"stages.{at}.merge.conv.", _ALL))
    for at, inner, mix in _blocks(config):
        place = f"stages.{at}.blocks.{inner}."
        sections.append(Section(f"{place}attn.", f"{place}mix.", attention_rules(mix, nchw=nchw)))
        sections.append(Section(place, place, (*NORMS, *(MLP_NCHW if nchw else MLP))))
    return KeyTable([*sections, TAIL])


def _pyramid(config: ModelConfig) -> PyramidConfig:
    if not isinstance(config, PyramidConfig):
        raise KeyError(f"it is of kind {config.kind!r} and not a pyramid")
    return config


def _blocks(config: PyramidConfig) -> Iterator[tuple[int, int, Mix]]:
    """Stage, block, and its mix."""
    for at, stage in enumerate(config.stages):
        for inner in range(stage.depth):
            yield at, inner, stage.mix


def faithful_stl(config: ModelConfig) -> ModelConfig:
    """Swin's shapes as in the authors' code, whose convolutions leave out what does not fill a patch."""
    assert isinstance(config, PyramidConfig)
    stages = [replace(stage, merge=stage.merge and replace(stage.merge, padding=0)) for stage in config.stages]
    return replace(config, stem=tuple(replace(one, padding=0) for one in config.stem), stages=tuple(stages))


def faithful_stl_nchw(config: ModelConfig) -> ModelConfig:
    """As `faithful_stl`, with the padding of the authors' second code in its routed layers."""
    config = faithful_stl(config)
    assert isinstance(config, PyramidConfig)
    stages = []
    for stage in config.stages:
        groups = tuple(_padded(one) if isinstance(one, TopKRegion) else one for one in stage.mix.groups)
        stages.append(replace(stage, mix=replace(stage.mix, groups=groups)))
    return replace(config, stages=tuple(stages))


def _padded(one: TopKRegion) -> PaddedTopKRegion:
    shared = {name: getattr(one, name) for name in ("scale", "lepe", "lepe_on", "qk_dim")}
    return PaddedTopKRegion(one.heads, one.regions, one.topk, **shared)


BIFORMER = Family(
    "biformer",
    partial(configuration, BiFormer),
    biformer_table,
    r"stages\.\d+\.\d+\.attn\.(qkv\.qkv|lepe)\.weight",
)
BIFORMER_STL = Family(
    "biformer_stl",
    partial(configuration, BiFormerSTL),
    stl_table,
    r"stages\.\d+\.blocks\.\d+\.attn\.qkv\.qkv\.weight",
    faithful=faithful_stl,
)
BIFORMER_STL_NCHW = Family(
    "biformer_stl_nchw",
    partial(configuration, NchwBiFormerSTL),
    partial(stl_table, nchw=True),
    r"stages\.\d+\.blocks\.\d+\.attn\.qkv_linear\.weight",
    faithful=faithful_stl_nchw,
)
