"""State dicts of the papers' authors: whole, wrapped, misnamed, of other shapes and numbers, and none at all."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnkit
from attnkit import factory
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.exchange import load
from attnkit_models.checkpoints.family import LAYERS, RELEASED, family_named
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import ODDITIES, any_of, misspelt, mutate_plain

# A released model is as large as its authors made it, so that only few cases load one whole.
WHOLE = 0.1
MOST_PARAMETERS = 5_000_000

HPARAMS: dict[str, Any] = {
    "num_classes": 5,
    "img_size": 32,
    "config": {
        "n_stages": 2,
        "base_dim": 8,
        "qna_heads": [2, 2],
        "qna_receptive_field": [3, 5],
        "qna_layers": [1, 1],
        "qna_normalize_q": [False, True],
        "qna_attention_scale": "posneg",
        "qna_num_queries": 2,
        "lsa_layers": [0, 1],
        "lsa_window": [4, 2],
        "lsa_heads": [1, 2],
    },
}
LAYER: dict[str, Any] = {"features": 8, "heads": 2, "kernel_size": 3, "stride": 1, "window_size": 2}


def case(dice: random.Random, folder: Path) -> None:
    way = dice.random()
    if way < 0.15:
        _names(dice)
        return
    if way < 0.35:
        _arguments(dice)
        return
    name = dice.choice(list(RELEASED))
    model, theirs = _model(name)
    given = _changed(dice, theirs)
    family = family_named(name)
    before = copy.deepcopy(model.state_dict())
    try:
        load(model, family.table(model.config), given, what=f"the state dict for {name!r}", family=family.name)  # pyright: ignore
    except BaseException:
        agree(_equal(model.state_dict(), before), "a state dict that was refused was loaded in part")
        raise
    with must_work("writing what was loaded"):
        written = export_official(RELEASED[name], model)
    right = _innermost(given)
    agree(_equal(written, right), "what is written differs from what was loaded")
    model.load_state_dict(before)


@functools.cache
def _model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A released model with one block a stage, and a state dict for it under the authors' names."""
    depth = "depth" if hasattr(factory.config(name), "depth") else "stages[*].depth"
    torch.manual_seed(0)
    model = attnkit.build(name, **{depth: 1, "num_classes": 3}).eval()
    theirs = {key: torch.randn_like(one) if one.is_floating_point() else one for key, one in _written(name, model)}
    return model, theirs


def _written(name: str, model: nn.Module) -> Any:
    return export_official(RELEASED[name], model).items()


def _changed(dice: random.Random, theirs: dict[str, Tensor]) -> Any:
    given: dict[Any, Any] = dict(theirs)
    for _ in range(dice.choice((0, 0, 0, 1, 1, 2))):
        if given:
            key = dice.choice(list(given))
            given |= _instead(dice, key, given.pop(key))
    if dice.random() < 0.2:
        given = {f"module.{key}": value for key, value in given.items()}
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        given = {dice.choice(("model", "state_dict", "params")): given, "epoch": 7}
    if dice.random() < 0.03:
        given["model"] = given
    return given if dice.random() < 0.95 else any_of(dice, ODDITIES)


def _instead(dice: random.Random, key: Any, value: Any) -> dict[Any, Any]:
    """What stands in a state dict instead of an entry."""
    tensor = value if isinstance(value, Tensor) else torch.ones(())
    ways: tuple[Any, ...] = (
        dict,
        lambda: {misspelt(str(key), dice): value},
        lambda: {key: value, "extra": value},
        lambda: {key: any_of(dice, ODDITIES)},
        lambda: {key: tensor[None]},
        lambda: {key: tensor.transpose(0, -1) if tensor.ndim else tensor},
        lambda: {key: _as(dice, tensor)},
        lambda: {key: value, 3: value},
    )
    return dice.choice(ways)()


def _as(dice: random.Random, value: Tensor) -> Any:
    """The same numbers as another kind of tensor."""
    ways: tuple[Any, ...] = (
        value.half,
        value.double,
        value.bool,
        lambda: value.to(torch.complex64),
        lambda: value.to("meta"),
        value.to_sparse,
        lambda: nn.Parameter(value) if value.is_floating_point() else value,
        value.numpy,
    )
    return dice.choice(ways)()


def _names(dice: random.Random) -> None:
    """Models and arguments by name, mostly wrong ones."""
    name: Any = misspelt(dice.choice(list(RELEASED)), dice) if dice.random() < 0.6 else any_of(dice, ODDITIES)
    hparams: Any = any_of(dice, (None, *ODDITIES))
    if dice.random() < WHOLE:
        name, hparams = "biformer_tiny", None
    import_official(name, any_of(dice, ({}, None, {"a": torch.ones(1)}, *ODDITIES)), hparams)


def _arguments(dice: random.Random) -> None:
    """Models and layers from the arguments of the authors' constructors."""
    if dice.random() < 0.4:
        hparams = mutate_plain(LAYER, dice, ODDITIES, dice.choice((0, 1, 1, 2)))
        import_official_layer(dice.choice(list(LAYERS)), {"Wk": torch.zeros(8, 8)}, hparams)
        return
    hparams = mutate_plain(HPARAMS, dice, ODDITIES, dice.choice((0, 0, 1, 1, 2)))
    config = family_named("qna_vit").config(hparams)
    with torch.device("meta"):
        count = sum(one.numel() for one in attnkit.build(config).parameters())
    if count > MOST_PARAMETERS:
        return
    with must_work("building a model twice"):
        theirs = export_official("qna_vit", attnkit.build(config))
    again = import_official("qna_vit", theirs, hparams)
    agree(_equal(export_official("qna_vit", again), theirs), "what is written differs from what was loaded")


def _innermost(given: Any) -> dict[str, Tensor]:
    while held := [given[name] for name in ("model", "state_dict", "params") if isinstance(given.get(name), dict)]:
        given = held[0]
    return {key.removeprefix("module."): value for key, value in given.items()}


def _equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return found.keys() == right.keys() and all(
        torch.equal(one, right[name].detach().to(one.dtype)) for name, one in found.items()
    )
