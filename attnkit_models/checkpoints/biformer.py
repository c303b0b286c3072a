"""BiFormer's authors' names: the three codes `biformer`, `biformer_stl` and `biformer_stl_nchw`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attnkit.errors import ConfigError
from attnkit_models.backbones import PyramidConfig
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.checkpoints.family import Family
from attnkit_models.checkpoints.keys import POINTWISE, KeyTable, Rule, Section

ROUTED = (
    Rule("attn.qkv.qkv.*", "mix.qkv.*"),
    Rule("attn.wo.*", "mix.proj.*"),
    Rule("attn.lepe.*", "mix.groups.0.lepe.*"),
)
DENSE = (
    Rule("attn.qkv.*", "mix.qkv.*"),
    Rule("attn.proj.*", "mix.proj.*"),
    Rule("attn.lepe.*", "mix.groups.0.lepe.*"),
)
NORMS = (Rule("norm1.*", "norm1.*"), Rule("norm2.*", "norm2.*"))
TAIL = Section("", "", (Rule("norm.*", "norm.*"), Rule("head.*", "head.*")))


def biformer_table(config: ModelConfig) -> KeyTable:
    """Names of `biformer`: norms behind the convolutions, a position convolution in every block."""
    config = _pyramid(config)
    mlp = (Rule("mlp.0.*", "mlp.fc1.*"), Rule("mlp.3.*", "mlp.fc2.*"), Rule("mlp.1.dwconv.*", "mlp.conv.*"))
    block = (
        Rule("pos_embed.*", "position_conv.*"),
        *NORMS,
        *mlp,
        Rule("gamma1", "scale1"),
        Rule("gamma2", "scale2"),
    )
    sections = [
        Section("downsample_layers.0.0.", "stem.0.conv.", _ALL),
        Section("downsample_layers.0.1.", "stem.0.norm.", _ALL),
        Section("downsample_layers.0.3.", "stem.1.conv.", _ALL),
        Section("downsample_layers.0.4.", "stem.1.norm.", _ALL),
    ]
    for at in range(1, len(config.stages)):
        sections.append(Section(f"downsample_layers.{at}.0.", f"stages.{at}.merge.conv.", _ALL))
        sections.append(Section(f"downsample_layers.{at}.1.", f"stages.{at}.merge.norm.", _ALL))
    for at, inner, rules in _blocks(config):
        sections.append(Section(f"stages.{at}.{inner}.", f"stages.{at}.blocks.{inner}.", (*rules, *block)))
    return KeyTable([*sections, TAIL])


def stl_table(config: ModelConfig) -> KeyTable:
    """Names of `biformer_stl`: norms before the convolutions."""
    config = _pyramid(config)
    mlp = (Rule("mlp.0.*", "mlp.fc1.*"), Rule("mlp.2.*", "mlp.fc2.*"))
    sections = _stl_downsampling(config)
    for at, inner, rules in _blocks(config):
        place = Section(f"stages.{at}.blocks.{inner}.", f"stages.{at}.blocks.{inner}.", (*rules, *NORMS, *mlp))
        sections.append(place)
    return KeyTable([*sections, TAIL])


def stl_nchw_table(config: ModelConfig) -> KeyTable:
    """Names of `biformer_stl_nchw`: linear layers are convolutions of one pixel."""
    config = _pyramid(config)
    linear = (
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
    )
    routed = (("attn.qkv_linear.", "mix.qkv."), ("attn.output_linear.", "mix.proj."))
    dense = (("attn.qkv.", "mix.qkv."), ("attn.proj.", "mix.proj."))
    sections = _stl_downsampling(config)
    for at, inner, rules in _blocks(config):
        names = (*(dense if rules is DENSE else routed), *linear)
        weights = [Rule(f"{theirs}weight", f"{ours}weight", POINTWISE) for theirs, ours in names]
        biases = [Rule(f"{theirs}bias", f"{ours}bias") for theirs, ours in names]
        lepe = Rule("attn.lepe.*", "mix.groups.0.lepe.*")
        place = f"stages.{at}.blocks.{inner}."
        sections.append(Section(place, place, (*weights, *biases, lepe, *NORMS)))
    return KeyTable([*sections, TAIL])


def _pyramid(config: ModelConfig) -> PyramidConfig:
    if not isinstance(config, PyramidConfig):
        raise KeyError(f"it is of kind {config.kind!r} and not a pyramid")
    return config


def _stl_downsampling(config: PyramidConfig) -> list[Section]:
    sections = [
        Section("downsample_layers.0.0.", "stem.0.conv.", _ALL),
        Section("downsample_layers.0.1.", "stem.0.norm.", _ALL),
    ]
    for at in range(1, len(config.stages)):
        sections.append(Section(f"downsample_layers.{at}.0.", f"stages.{at}.merge.norm.", _ALL))
        sections.append(Section(f"downsample_layers.{at}.1.", f"stages.{at}.merge.conv.", _ALL))
    return sections


def _blocks(config: PyramidConfig) -> Iterator[tuple[int, int, tuple[Rule, ...]]]:
    """Stage, block, and the rules of its attention."""
    for at, stage in enumerate(config.stages):
        rules = ROUTED if stage.mix.groups[0].kind == "topk_region" else DENSE
        for inner in range(stage.depth):
            yield at, inner, rules


def _later(hparams: Mapping[str, Any]) -> ModelConfig:
    raise ConfigError(f"other models than the released ones are not part of this version yet, but got {dict(hparams)}")


_ALL = (Rule("*", "*"),)

BIFORMER = Family("biformer", _later, biformer_table, r"stages\.\d+\.\d+\.attn\.(qkv\.qkv|lepe)\.weight")
BIFORMER_STL = Family("biformer_stl", _later, stl_table, r"stages\.\d+\.blocks\.\d+\.attn\.qkv\.qkv\.weight")
BIFORMER_STL_NCHW = Family(
    "biformer_stl_nchw", _later, stl_nchw_table, r"stages\.\d+\.blocks\.\d+\.attn\.qkv_linear\.weight"
)
