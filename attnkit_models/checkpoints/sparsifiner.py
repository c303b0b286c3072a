"""Sparsifiner's authors' names: DeiT's and LV-ViT's, and a `mask_predictor` in every layer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.primitives import CompetingMaskPredictor, MaskPredictor
from attnkit.primitives.resizing import rows_for_grid
from attnkit_models.backbones import IsotropicConfig
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.backbones.isotropic import resized_positions
from attnkit_models.checkpoints.family import Family
from attnkit_models.checkpoints.keys import KeyTable, Resize, Rule, Section
from attnkit_models.checkpoints.sparsifiner_arguments import Sparsifiner, SparsifinerLVViT, configuration

LATER = r"blocks\.\d+\.attn\.mask_predictor\..*"


def attention_rules(grid: Grid | None) -> tuple[Rule, ...]:
    """Names inside an attention layer.

    Args:
        grid: how its tokens lie, for tables of other images; None where nothing says how those lay.
    """
    resize: dict[bool, Resize | None] = {summed: grid and partial(_rows, grid, summed) for summed in (True, False)}
    return (
        Rule("qkv.*", "qkv.*"),
        Rule("proj.*", "proj.*"),
        Rule("mask_predictor.proj_n", "groups.0.predictor.down", resize=resize[True]),
        Rule("mask_predictor.proj_back_n", "groups.0.predictor.up", resize=resize[False]),
        Rule("mask_predictor.proj_c_q.*", "groups.0.predictor.query.*"),
        Rule("mask_predictor.proj_c_k.*", "groups.0.predictor.key.*"),
    )


def _rows(grid: Grid, summed: bool, rows: Tensor) -> Tensor | None:
    """A predictor's rows, made for another square image, for this one."""
    count = len(rows) - grid.prefix
    if count < 1 or math.isqrt(count) ** 2 != count:
        return None
    return torch.cat([rows[: grid.prefix], rows_for_grid(rows, count, grid, summed=summed)])


def _positions(grid: Grid, table: Tensor) -> Tensor | None:
    """A position table, made for another square image, for this one."""
    side = math.isqrt(max(table.shape[1] - grid.prefix, 0))
    if not side or table.shape[1] != grid.prefix + side * side:
        return None
    return resized_positions(table, Grid(side, side, prefix=grid.prefix), grid)


BLOCK = (Rule("norm1.*", "norm1.*"), Rule("norm2.*", "norm2.*"), Rule("mlp.fc1.*", "mlp.fc1.*"))
BLOCK += (Rule("mlp.fc2.*", "mlp.fc2.*"),)


def model_table(config: ModelConfig) -> KeyTable:
    """Names of a whole model."""
    if not isinstance(config, IsotropicConfig):
        raise KeyError(f"it is of kind {config.kind!r} and not isotropic")
    kinds = {group.kind for mix in config.mixes for group in mix.groups}
    if not all(kind.startswith("mask_") or kind.endswith("mask_predictor") for kind in kinds):
        raise KeyError(f"its heads are {', '.join(sorted(kinds))}")
    everything = (Rule("*", "*"),)
    last = len(config.stem) - 1
    sections = [Section("patch_embed.proj.", f"stem.{last}.conv.", everything)]
    for at in range(last):
        sections.append(Section(f"patch_embed.conv{at + 1}.", f"stem.{at}.conv.", everything))
        sections.append(Section(f"patch_embed.bn{at + 1}.", f"stem.{at}.norm.", everything))
    rules = attention_rules(config.grid)
    for at in range(config.depth):
        place = f"blocks.{at}."
        sections += [Section(f"{place}attn.", f"{place}mix.", rules), Section(place, place, BLOCK)]
    head = [Rule("cls_token", "cls_token"), Rule("pos_embed", "pos_embed", resize=partial(_positions, config.grid))]
    head += [Rule(f"{name}.*", f"{name}.*") for name in ("norm", "head", "aux_head")]
    return KeyTable([*sections, Section("", "", tuple(head))])


def faithful(config: ModelConfig) -> ModelConfig:
    """The class token competes for a place among the keys, and patches that are not whole are left out."""
    assert isinstance(config, IsotropicConfig)
    mixes = []
    for mix in config.mixes:
        groups = [CompetingMaskPredictor(**vars(one)) if isinstance(one, MaskPredictor) else one for one in mix.groups]
        mixes.append(replace(mix, groups=tuple(groups)))
    *first, patches = config.stem
    return replace(
        config,
        mix=tuple(mixes) if isinstance(config.mix, tuple) else mixes[0],
        stem=(*first, replace(patches, padding=0)),
    )


SPARSIFINER = Family(
    "sparsifiner",
    partial(configuration, Sparsifiner),
    model_table,
    r"blocks\.\d+\.attn\.mask_predictor\.proj_n",
    LATER,
    faithful,
)
SPARSIFINER_LVVIT = Family(
    "sparsifiner_lvvit",
    partial(configuration, SparsifinerLVViT),
    model_table,
    r"patch_embed\.conv1\.weight",
    LATER,
    faithful,
)
