"""Exchange: weights from an authors' state dict into our model and back, all of them or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attnkit
from attnkit import registry
from attnkit.errors import CheckpointError, ConfigError, shown
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.checkpoints.family import FAMILIES, LAYERS, RELEASED, Family, family_named, layer_named, other_shape
from attnkit_models.checkpoints.keys import KeyTable, Pair, inward, outward
from attnkit_models.checkpoints.tables import fitted

# How many names an error shows of each kind.
SHOWN = 4
# Under which entries training code keeps the model's state dict, and what data parallelism puts before names.
WRAPPERS = ("model", "state_dict", "params")
PARALLEL = "module."


def import_official(
    name: str,
    state_dict: Mapping[str, Any],
    hparams: Mapping[str, Any] | None = None,
    *,
    resize_tables: bool = False,
    backbone_only: bool = False,
) -> nn.Module:
    """Loads the weights of a paper's authors into a model that computes what their code does.

    That includes what `attnkit.build` of the same name leaves out: zeros that their code pads maps with and that take
    part in the softmax (`biformer_stl_nchw`), and a class token that competes for a place among the keys (Sparsifiner).
    The weights of one fit the other: `attnkit.build(name).load_state_dict(import_official(name, ...).state_dict())`.

    Weights become the model's float32. From float16 and bfloat16 that is exact, so that `export_official` gives back
    the numbers of any such state dict, in float32; float64 is rounded.

    Args:
        name: a released model, such as `"biformer_tiny"`; or a family, such as `"biformer"`.
        state_dict: the authors' names to tensors, or a checkpoint that holds them under `"model"`, `"state_dict"` or
            `"params"`; names may begin with `module.`, as data parallelism leaves them.
        hparams: the arguments of the authors' constructor, for a family; None for a released model.
        resize_tables: resize biases and gains that were learned for windows of another size bicubically, as QnA's
            authors do for fine-tuning, and positions and predictors of Sparsifiner that were learned for images of
            another size. Otherwise they are tensors that do not fit.
        backbone_only: the state dict has no mask predictors, as the files that Sparsifiner's training begins with;
            those of the model stay random. Otherwise they are missing.

    Returns:
        The model in evaluation mode, with every weight loaded, but for the predictors with `backbone_only`.

    Raises:
        ConfigError: for an unknown name or argument, or arguments that were left out or are not wanted.
        CheckpointError: for names or shapes that do not fit, with the first few of each kind and a guess of the family.
    """
    family = family_named(name)
    config = _config(name, family, hparams)
    model = attnkit.build(config)
    what = f"the state dict for {name!r}"
    if backbone_only and not family.later:
        raise ConfigError(f"backbone_only=True goes with models of Sparsifiner, but {name!r} is trained in one piece")
    table = family.table(config)
    load(
        model,
        table,
        state_dict,
        what=what,
        family=family.name,
        resize_tables=resize_tables,
        later=family.later,
        without_later=backbone_only,
    )
    return model.eval()


def export_official(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Writes weights under the names and in the shapes of the authors' code: the imports backwards.

    Args:
        name: a released model or a family, as for `import_official`, or a class, as for `import_official_layer`.
        model: a model of that family, or a module that `import_official_layer` made.

    Returns:
        The authors' names to new tensors.

    Raises:
        ConfigError: for an unknown name.
        CheckpointError: for a model of another kind, or of other widths or depths than the released model of that name;
            classes and image sizes may differ.
    """
    layer = layer_named(name) if isinstance(name, str) and name in LAYERS else None
    called = name if layer else family_named(name).name
    config: Any = getattr(model, "config", None)
    refusal = f"this model cannot be written as a {called!r} of its authors"
    if not layer and not isinstance(config, ModelConfig):
        raise CheckpointError(f"{refusal}: it is a {type(model).__name__}, not a model of attnkit_models")
    try:
        table = layer.table(model) if layer else family_named(name).table(config)
        pairs = table.pairs(model.state_dict())
    except KeyError as error:
        raise CheckpointError(f"{refusal}: {error.args[0]}") from None
    except (AttributeError, IndexError, AssertionError):
        what = type(model).__name__ if layer else f"model of kind {config.kind!r}"
        raise CheckpointError(f"{refusal}: it is a {what} with other parts than theirs") from None
    differs = "" if layer else other_shape(name, config)
    if differs:
        raise CheckpointError(f"this model is no {name!r}: {differs}; write it as the family {called!r}")
    return {key: tensor.clone() for key, tensor in outward(pairs, model.state_dict()).items()}


def import_official_layer(
    upstream_class: str,
    state_dict: Mapping[str, Any],
    hparams: Mapping[str, Any] | None = None,
    *,
    resize_tables: bool = False,
) -> nn.Module:
    """Loads one module of an authors' code, such as the attention layer out of someone's detector.

    Args:
        upstream_class: the name of the authors' class, such as `"BiLevelRoutingAttention"`.
        state_dict: the module's state dict.
        hparams: the arguments of the authors' constructor.
        resize_tables: as for `import_official`, as is what becomes of other dtypes than float32.

    Returns:
        A module in evaluation mode whose inputs and outputs lie as the authors' do.

    Raises:
        ConfigError: for an unknown class or argument.
        CheckpointError: for names or shapes that do not fit.
    """
    layer = layer_named(upstream_class)
    theirs = unwrapped(state_dict)
    module = layer.build(_arguments(hparams), theirs)
    what = f"the state dict for {upstream_class!r}"
    load(module, layer.table(module), theirs, what=what, family=None, resize_tables=resize_tables)
    return module.eval()


def load(
    model: nn.Module,
    table: KeyTable,
    state_dict: Mapping[str, Any],
    *,
    what: str,
    family: str | None,
    resize_tables: bool = False,
    later: str = "",
    without_later: bool = False,
) -> None:
    """Loads a whole state dict of the authors, or raises and leaves the model as it was.

    Args:
        model: the model.
        table: its names.
        state_dict: the authors'.
        what: what messages call that.
        family: name of the family, or None for a layer.
        resize_tables: as for `import_official`.
        later: as for `Family`.
        without_later: whether these are left as they are.
    """
    theirs = unwrapped(state_dict)
    ours = model.state_dict()
    pairs = table.pairs(ours)
    rest = [pair for pair in pairs if not re.fullmatch(later, pair.theirs)] if later else pairs
    if without_later:
        pairs = rest
        ours = {pair.ours: ours[pair.ours] for pair in pairs}
    theirs = fitted(pairs, ours, theirs) if resize_tables else theirs
    found = problems(pairs, ours, theirs)
    if found:
        guessed = guess(theirs)
        hint = f"; it looks like a state dict of {guessed!r}" if guessed and guessed != family else ""
        if not hint and not resize_tables and not problems(pairs, ours, fitted(pairs, ours, theirs)):
            hint = "; these are tables of other windows or images, which resize_tables=True resizes"
        kept = {pair.ours: ours[pair.ours] for pair in rest}
        if len(rest) < len(pairs) and not problems(rest, kept, theirs):
            hint = "; a backbone without mask predictors loads with backbone_only=True"
        raise CheckpointError(f"{what} does not fit: {'; '.join(found)}{hint}")
    model.load_state_dict(inward(pairs, theirs), strict=not without_later)


def problems(pairs: list[Pair], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being loaded."""
    wanted = outward(pairs, {name: tensor.to("meta") for name, tensor in ours.items()})
    missing = [key for key in wanted if key not in theirs]
    unknown = [key for key in theirs if key not in wanted]
    shapes = [
        f"{key} {tuple(theirs[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in theirs and theirs[key].shape != wanted[key].shape
    ]
    kinds = [
        f"{key} of {theirs[key].dtype}"
        for key in wanted
        if key in theirs and _numbers(theirs[key]) != _numbers(wanted[key])
    ]
    # Copying these would stop halfway.
    empty = [key for key in wanted if key in theirs and (theirs[key].is_meta or theirs[key].layout != torch.strided)]
    found = []
    for some, one, many in (
        (missing, "is missing", "are missing"),
        (unknown, "is not known", "are not known"),
        (shapes, "has another shape", "have another shape"),
        (kinds, "has another dtype", "have another dtype"),
        (empty, "is sparse or without values", "are sparse or without values"),
    ):
        if some:
            found.append(f"{len(some)} {one if len(some) == 1 else many} ({_some(some)})")
    return found


def _numbers(tensor: Tensor) -> tuple[bool, bool, bool]:
    """What a tensor may not change about its numbers when it is copied; their precision it may."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The names and tensors inside a checkpoint.

    Raises:
        CheckpointError: if there are none.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"a state dict maps names to tensors, but got {type(state_dict).__name__}")
    inner: Mapping[str, Any] = state_dict
    # Not for as long as there is one: a checkpoint may contain itself.
    for _ in WRAPPERS:
        held = [inner[name] for name in WRAPPERS if isinstance(inner.get(name), Mapping)]
        inner = held[0] if held else inner
    bad = [key for key, value in inner.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if bad or not inner:
        seen = f"{shown(bad[0])} holds {type(inner[bad[0]]).__name__}" if bad else "it is empty"
        raise CheckpointError(f"a state dict maps names to tensors, but {seen}")
    if all(key.startswith(PARALLEL) for key in inner):
        inner = {key[len(PARALLEL) :]: value for key, value in inner.items()}
    return dict(inner)


def guess(theirs: Iterable[str]) -> str | None:
    """The family whose telltale name stands among the names, or None."""
    names = list(theirs)
    for name in FAMILIES:
        if any(re.fullmatch(family_named(name).telltale, key) for key in names):
            return name
    return None


def _config(name: str, family: Family, hparams: Mapping[str, Any] | None) -> ModelConfig:
    if name in RELEASED and (name not in FAMILIES or hparams is None):
        if hparams is not None:
            raise ConfigError(f"{name!r} is a released model and takes no hparams; give them with {family.name!r}")
        config = registry.recipe(name)()
        assert isinstance(config, ModelConfig)
        return family.faithful(config)
    if hparams is None:
        released = [one for one, of in RELEASED.items() if of == name]
        raise ConfigError(f"{name!r} is a family and needs hparams, or give a released model: {', '.join(released)}")
    return family.config(_arguments(hparams))


def _arguments(hparams: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the authors' constructor as a dict of names.

    Raises:
        ConfigError: if they are none.
    """
    if hparams is None:
        return {}
    if not isinstance(hparams, Mapping) or not all(isinstance(name, str) for name in hparams):
        raise ConfigError(f"hparams maps the names of the constructor's arguments to values, but got {shown(hparams)}")
    return dict(hparams)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
