"""build: a model, a block or a mix from a name, options or a plain dict."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from attnkit import registry
from attnkit.errors import ConfigError, did_you_mean
from attnkit.options import Options, field_types
from attnkit.primitives.base import PrimitiveOptions


@runtime_checkable
class Buildable(Protocol):
    """Options that stand for a whole module."""

    def build(self) -> nn.Module:
        """Makes the module."""
        ...


_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+|\*)\]")


def build(name_or_config: str | Mapping[str, Any] | Options, **overrides: Any) -> nn.Module:
    """Builds a model, a block or a mix.

    Args:
        name_or_config: a recipe's name (see `attnkit.list_models`), options such as a recipe's configuration, or a
            plain dict whose `kind` is `"mix"`, `"block"`, `"pyramid"`, `"isotropic"` or a recipe's name.
        **overrides: changes to the configuration, by field name or by path: `num_classes=10`, `img_size=(96, 160)`,
            `**{"stages[2].mix.groups[1].window": 64}`; `[*]` stands for every entry.

    Returns:
        The module, in training mode, with fresh weights.

    Raises:
        ConfigError: for an unknown name, or with every mistake in the options, each with its path and the nearest
            right name.
    """
    options = override(config(name_or_config), overrides)
    if isinstance(options, PrimitiveOptions) or not isinstance(options, Buildable):
        raise ConfigError(
            f"{options.kind!r} is a head group, which needs a mix around it: "
            f"{{'kind': 'mix', 'dim': 96, 'groups': [{options.to_dict()}]}}"
        )
    return options.build()


def config(name_or_config: str | Mapping[str, Any] | Options) -> Options:
    """The configuration that `build` would use, before overrides; arguments and errors as there."""
    if isinstance(name_or_config, Options):
        return name_or_config
    if isinstance(name_or_config, str):
        return registry.recipe(name_or_config)()
    if not isinstance(name_or_config, Mapping):
        raise ConfigError(f"build needs a model's name, options or a plain dict, but got {name_or_config!r}")
    plain = dict(name_or_config)
    kind = plain.get("kind")
    kinds = [*registry.STRUCTURES, *registry.RECIPES]
    if not isinstance(kind, str):
        raise ConfigError(f"the dict needs a 'kind', such as 'mix', 'block' or 'bigbird_vit', but got {plain!r}")
    if kind in registry.RECIPES:
        del plain["kind"]
        return override(registry.recipe(kind)(), plain)
    if kind not in registry.STRUCTURES:
        registry_names = [*kinds, *registry.list_primitives()]
        if kind not in registry_names:
            raise ConfigError(f"unknown kind {kind!r}{did_you_mean(kind, registry_names)} (kinds: {', '.join(kinds)})")
        return registry.primitive_class(kind).from_dict(plain)
    return registry.load(registry.STRUCTURES[kind]).from_dict(plain)


def override(options: Options, changes: Mapping[str, Any]) -> Options:
    """Options with changes applied by path, such as `{"stages[2].mix.groups[1].window": 64}`.

    Raises:
        ConfigError: with every path that leads nowhere or value that does not fit.
    """
    errors = []
    for path, value in changes.items():
        try:
            steps = _steps(path)
            options = _set(options, steps, value, path)
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("; ".join(errors))
    return options


def _steps(path: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in path.split("."):
        found = _STEP.findall(part)
        if not found or "".join(name or f"[{index}]" for name, index in found) != part or not found[0][0]:
            raise ConfigError(f"override path {path!r} is not of the form 'stages[2].mix.groups[1].window'")
        steps += [name or (-1 if index == "*" else int(index)) for name, index in found]
    return steps


def _set(node: Any, steps: list[str | int], value: Any, path: str) -> Any:
    if not steps:
        return _read(value, path)
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        if not isinstance(node, tuple):
            raise ConfigError(f"override {path!r}: there is no list before [{'*' if step < 0 else step}], but {node!r}")
        if step >= len(node):
            raise ConfigError(f"override {path!r}: index {step} is beyond the {len(node)} entries (0..{len(node) - 1})")
        chosen = range(len(node)) if step < 0 else (step,)
        return tuple(_set(one, rest, value, path) if at in chosen else one for at, one in enumerate(node))
    if not isinstance(node, Options):
        raise ConfigError(f"override {path!r}: there are no options before {step!r}, but {node!r}")
    known = field_types(type(node))
    if step not in known:
        label = node.kind or type(node).__name__
        raise ConfigError(
            f"override {path!r}: unknown option {step!r} for {label!r}{did_you_mean(step, known)} "
            f"(options: {', '.join(known)})"
        )
    changed = _set(getattr(node, step), rest, value, path)
    if not rest and _holds_mappings(changed):
        return type(node).from_dict({**_shallow(node), step: changed}, path=path)
    try:
        return dataclasses.replace(node, **{step: changed})
    except ConfigError as error:
        raise ConfigError(f"override {path!r}: {error}") from None


def _read(value: Any, path: str) -> Any:
    """Options from plain dicts that say their kind, also inside a list."""
    if isinstance(value, (list, tuple)):
        return tuple(_read(one, f"{path}[{at}]") for at, one in enumerate(value))
    if isinstance(value, Mapping) and "kind" in value:
        return Options.from_dict(value, path=path)
    return value


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(map(_holds_mappings, value)))


def _shallow(node: Options) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
