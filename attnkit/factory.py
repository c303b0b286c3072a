"""build: a model, a block or a mix from a name, options or a plain dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from attnkit import registry
from attnkit.annotations import entries
from attnkit.errors import ConfigError, did_you_mean, nearest, shown
from attnkit.options import Options, changed, field_types, read_value
from attnkit.primitives.base import PrimitiveOptions


@runtime_checkable
class Buildable(Protocol):
    """Options that stand for a whole module."""

    def build(self) -> nn.Module:
        """Makes the module."""
        ...


# Where a change goes below some options, what it puts there, and the path as it was written.
_Change: TypeAlias = "tuple[list[str | int], Any, str]"

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
    if isinstance(options, PrimitiveOptions):
        raise ConfigError(
            f"{options.kind!r} is a head group, which needs a mix around it: "
            f"{{'kind': 'mix', 'dim': 96, 'groups': [{options.to_dict()}]}}"
        )
    if options.kind in registry.PARTS or not isinstance(options, Buildable):
        raise ConfigError(
            f"{options.kind!r} is a part of a model, not a whole one; build a 'mix', a 'block', a 'pyramid' or an "
            f"'isotropic'"
        )
    return options.build()


def config(name_or_config: str | Mapping[str, Any] | Options) -> Options:
    """The configuration that `build` would use, before overrides; arguments and errors as there."""
    if isinstance(name_or_config, Options):
        return name_or_config
    if isinstance(name_or_config, str):
        return registry.recipe(name_or_config)()
    if not isinstance(name_or_config, Mapping):
        raise ConfigError(f"build needs a model's name, options or a plain dict, but got {shown(name_or_config)}")
    plain = dict(name_or_config)
    kind = plain.get("kind")
    kinds = [*registry.STRUCTURES, *registry.RECIPES]
    if not isinstance(kind, str):
        raise ConfigError(f"the dict needs a 'kind', such as 'mix', 'block' or 'bigbird_vit', but got {shown(plain)}")
    if kind in registry.RECIPES:
        del plain["kind"]
        return override(registry.recipe(kind)(), plain)
    if kind not in registry.STRUCTURES:
        registry_names = [*kinds, *registry.list_primitives()]
        if kind not in registry_names:
            raise ConfigError(
                f"unknown kind {shown(kind)}{did_you_mean(kind, registry_names)} (kinds: {', '.join(kinds)})"
            )
        return registry.primitive_class(kind).from_dict(plain)
    return registry.load(registry.STRUCTURES[kind]).from_dict(plain)


def override(options: Options, changes: Mapping[str, Any]) -> Options:
    """Options with changes applied by path, such as `{"stages[2].mix.groups[1].window": 64}`.

    All changes are made before anything is checked, since some options only fit together.

    Args:
        options: any options, such as a recipe's configuration; they stay as they are.
        changes: paths to values. A path is field names with dots between them and `[2]` behind a list, or `[*]` for
            all of its entries; a value is one of the field's type, or plain data that reads as one.

    Returns:
        New options of the same class, or `options` where nothing changes.

    Raises:
        ConfigError: with every path that leads nowhere or value that does not fit.
    """
    errors: list[str] = []
    parsed: list[_Change] = []
    for path, value in changes.items():
        try:
            parsed.append((_steps(path), value, path))
        except ConfigError as error:
            errors.append(str(error))
    made = _changed(options, type(options), parsed, "", errors)
    if errors:
        raise ConfigError("; ".join(dict.fromkeys(errors)))
    return made


def _steps(path: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in str(path).split("."):
        found = _STEP.findall(part)
        written = "".join(name or f"[{index}]" for name, index in found)
        if not found or written != part or [bool(name) for name, _ in found] != [True, *[False] * (len(found) - 1)]:
            raise ConfigError(f"override path {shown(path)} is not of the form 'stages[2].mix.groups[1].window'")
        steps += [name or (-1 if index == "*" else int(index)) for name, index in found]
    return steps


def _changed(node: Any, annotation: Any, changes: list[_Change], where: str, errors: list[str]) -> Any:
    """A node with all changes below it made before it is checked, for some options only fit together."""
    for at, (steps, value, _) in enumerate(changes):
        if not steps:
            before = len(errors)
            read = read_value(value, annotation, where, errors)
            return node if len(errors) > before else _changed(read, annotation, changes[at + 1 :], where, errors)
    fields = field_types(type(node)) if isinstance(node, Options) else {}
    deeper: dict[Any, list[_Change]] = {}
    made: dict[Any, Any] = {}
    for steps, value, path in changes:
        try:
            found = _entries(node, steps[0], path)
        except ConfigError as error:
            errors.append(str(error))
            meant = nearest(steps[0], fields)
            made |= {meant: value} if meant and len(steps) == 1 else {}
            continue
        for entry in found:
            deeper.setdefault(entry, []).append((steps[1:], value, path))
    # What a misspelt name was probably meant for only serves to judge the other fields.
    wrong = made.keys() - deeper.keys()
    single = {steps[0] for steps, _, _ in changes}
    inner = entries(node, annotation)
    for entry, some in deeper.items():
        before = len(errors)
        if isinstance(node, tuple):
            # Entries that change only together share their path, so that what is said of them is said once.
            label = entry if entry in single else "*"
            part = Any if inner is None else inner[entry]
            made[entry] = _changed(node[entry], part, some, f"{where}[{label}]", errors)
        else:
            place = f"{where}.{entry}" if where else entry
            made[entry] = _changed(getattr(node, entry), fields[entry], some, place, errors)
        wrong |= {entry} if len(errors) > before else set()
    if isinstance(node, tuple):
        return tuple(made.get(at, one) for at, one in enumerate(node))
    return changed(node, made, where, errors, wrong=wrong) if made else node


def _entries(node: Any, step: str | int, path: str) -> list[str | int]:
    """The names or places below a node that one step of a path leads to."""
    if isinstance(step, int):
        if not isinstance(node, tuple):
            place = "*" if step < 0 else step
            raise ConfigError(f"override {shown(path)}: there is no list before [{place}], but {shown(node)}")
        if step >= len(node):
            raise ConfigError(
                f"override {shown(path)}: index {step} is beyond the {len(node)} entries (0..{len(node) - 1})"
            )
        return list(range(len(node))) if step < 0 else [step]
    if isinstance(node, tuple):
        raise ConfigError(
            f"override {shown(path)}: a list of {len(node)} stands before {step!r}; add [0], or [*] for all"
        )
    if not isinstance(node, Options):
        raise ConfigError(f"override {shown(path)}: there are no options before {step!r}, but {shown(node)}")
    known = field_types(type(node))
    if step not in known:
        label = node.kind or type(node).__name__
        raise ConfigError(
            f"override {shown(path)}: unknown option {shown(step)} for {label!r}{did_you_mean(step, known)} "
            f"(options: {', '.join(known)})"
        )
    return [step]
