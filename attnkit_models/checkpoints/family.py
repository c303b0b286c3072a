"""Family: what has to be known about an authors' code to exchange weights with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnkit.errors import ConfigError, did_you_mean, shown
from attnkit.registry import RECIPES, recipe
from attnkit_models.backbones import IsotropicConfig, PyramidConfig
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.checkpoints.keys import KeyTable


def _same(config: ModelConfig) -> ModelConfig:
    return config


@dataclass(frozen=True)
class Family:
    """One authors' code.

    Attributes:
        name: its name, as `import_official` takes it.
        config: the options of our model from the arguments of the authors' constructor.
        table: the names of such a model.
        telltale: a name that only this family's state dicts have, as a regular expression.
        later: names of what is trained later than the rest, as a regular expression: files of the rest alone are what
            that training begins with.
        faithful: our recipe's options, changed to what the authors' code computes where that is not the same.
    """

    name: str
    config: Callable[[Mapping[str, Any]], ModelConfig]
    table: Callable[[ModelConfig], KeyTable]
    telltale: str
    later: str = ""
    faithful: Callable[[ModelConfig], ModelConfig] = _same


@dataclass(frozen=True)
class Layer:
    """One module of an authors' code, carried alone.

    Attributes:
        build: our module, with the inputs and outputs of theirs, from the arguments of the authors' constructor and
            the tensors by the authors' names: some codes take a width from the input, which only the weights then tell.
        table: the names of such a module.
    """

    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]
    table: Callable[[nn.Module], KeyTable]


# Where the families and layers are; each module is imported on use.
FAMILIES: dict[str, str] = {
    "biformer": "attnkit_models.checkpoints.biformer:BIFORMER",
    "biformer_stl": "attnkit_models.checkpoints.biformer:BIFORMER_STL",
    "biformer_stl_nchw": "attnkit_models.checkpoints.biformer:BIFORMER_STL_NCHW",
    "qna_vit": "attnkit_models.checkpoints.qna:QNA_VIT",
    "sparsifiner_lvvit": "attnkit_models.checkpoints.sparsifiner:SPARSIFINER_LVVIT",
    "sparsifiner": "attnkit_models.checkpoints.sparsifiner:SPARSIFINER",
}

RELEASED: dict[str, str] = {
    "biformer_tiny": "biformer",
    "biformer_small": "biformer",
    "biformer_base": "biformer",
    "biformer_stl": "biformer_stl",
    "biformer_stl_nchw": "biformer_stl_nchw",
    "qna_vit_tiny": "qna_vit",
    "qna_vit_tiny_7x7": "qna_vit",
    "qna_vit_small": "qna_vit",
    "qna_vit_base": "qna_vit",
    "sparsifiner_deit_tiny": "sparsifiner",
    "sparsifiner_deit_small": "sparsifiner",
    "sparsifiner_deit_base": "sparsifiner",
    "sparsifiner_lvvit_small": "sparsifiner_lvvit",
}

LAYERS: dict[str, str] = {
    "BiLevelRoutingAttention": "attnkit_models.checkpoints.biformer_layers:BI_LEVEL_ROUTING_ATTENTION",
    "nchwBRA": "attnkit_models.checkpoints.biformer_layers:NCHW_BRA",
    "Attention": "attnkit_models.checkpoints.biformer_layers:ATTENTION",
    "AttentionLePE": "attnkit_models.checkpoints.biformer_layers:ATTENTION_LEPE",
    "nchwAttentionLePE": "attnkit_models.checkpoints.biformer_layers:NCHW_ATTENTION_LEPE",
    "Block": "attnkit_models.checkpoints.biformer_layers:BLOCK",
    "FusedKQnA": "attnkit_models.checkpoints.qna_layers:FUSED_K_QNA",
    "QnAUpsample": "attnkit_models.checkpoints.qna_layers:QNA_UPSAMPLE",
    "QnABlock": "attnkit_models.checkpoints.qna_layers:QNA_BLOCK",
    "MultiHeadSelfAttention": "attnkit_models.checkpoints.qna_layers:MULTI_HEAD_SELF_ATTENTION",
    "SparsifinerAttention": "attnkit_models.checkpoints.sparsifiner_layers:SPARSIFINER_ATTENTION",
}


def family_named(name: str) -> Family:
    """A family by its own name or that of a released model.

    Raises:
        ConfigError: if there is none, naming the nearest.
    """
    known = {**FAMILIES, **RELEASED}
    if isinstance(name, str) and name in RECIPES and name not in known:
        raise ConfigError(f"attnkit has {name!r}, but there are no official weights of it (models: {', '.join(known)})")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"unknown official model {shown(name)}{did_you_mean(name, known)} (models: {', '.join(known)})"
        )
    return _load(FAMILIES[RELEASED.get(name, name)])


def other_shape(name: str, config: ModelConfig) -> str:
    """What of a model is not as in the released model of a name: widths or depths, in words; empty where all is."""
    if name not in RELEASED or name in FAMILIES:
        return ""
    for what, found, right in zip(("widths", "depths"), _sizes(config), _sizes(recipe(name)()), strict=True):
        if found != right:
            return f"its {what} are {list(found)}, but those of {name!r} are {list(right)}"
    return ""


def _sizes(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and depths of the stages; an isotropic model is one stage."""
    if isinstance(config, IsotropicConfig):
        return (config.dim,), (config.depth,)
    assert isinstance(config, PyramidConfig)
    return tuple(stage.dim for stage in config.stages), tuple(stage.depth for stage in config.stages)


def layer_named(name: str) -> Layer:
    """A layer by the name of the authors' class.

    Raises:
        ConfigError: if there is none, naming the nearest.
    """
    if not isinstance(name, str) or name not in LAYERS:
        near = did_you_mean(name, LAYERS)
        raise ConfigError(f"unknown official layer {shown(name)}{near} (layers: {', '.join(LAYERS)})")
    return _load(LAYERS[name])


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
