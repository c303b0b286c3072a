"""What to train, from `--model`, `--config` and `--set`: plain data, checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnkit import factory
from attnkit.errors import ConfigError, did_you_mean, shown
from attnkit_models.train.mistakes import Mistakes
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.plaindata import parse_yaml
from attnkit_models.train.sparsifying_options import SparsifyingOptions


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file's sections; what the file leaves out is None or empty."""

    model: str | dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    data: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> ConfigFile:
    """Reads a YAML file: a model's configuration alone, or sections `model`, `train`, `baseline`, `data`,
    `recipe`.

    Raises:
        ConfigError: if the file cannot be read, is no YAML mapping, or names unknown sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ConfigError(f"configuration file {path} cannot be read: {reason}") from error
    try:
        plain = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(plain, dict) or not plain:
        raise ConfigError(
            f"configuration file {path} must hold a model's options or a 'model:' section, but holds {shown(plain)}"
        )
    if not any(name in plain for name in ("model", "train", "recipe")):
        return ConfigFile(model=plain)
    wanted: dict[str, tuple[type, ...]] = {
        "model": (str, dict),
        "train": (dict,),
        "baseline": (str,),
        "data": (str,),
        "recipe": (dict,),
    }
    mistakes = Mistakes()
    for name, value in plain.items():
        with mistakes.noted():
            if name not in wanted:
                known = ", ".join(wanted)
                raise ConfigError(
                    f"{path}: unknown section {shown(name)}{did_you_mean(name, wanted)} (sections: {known})"
                )
            if not isinstance(value, wanted[name]):
                kinds = " or ".join({str: "a name", dict: "a mapping"}[kind] for kind in wanted[name])
                raise ConfigError(f"{path}: section {name!r} must be {kinds}, but got {shown(value)}")
    mistakes.told()
    return ConfigFile(**plain)


def check_model(source: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> None:
    """Looks at a model's configuration as `attnkit.build` would, without building anything.

    Raises:
        ConfigError: with its mistakes, and those of the overrides.
    """
    factory.override(factory.config(source), overrides or {})


def read_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Reads `--set path=value` arguments; values are YAML: `64`, `true`, `[96, 160]`.

    Raises:
        ConfigError: for every argument that is not `path=value`, and every path that is set twice.
    """
    overrides: dict[str, Any] = {}
    mistakes = Mistakes()
    for assignment in assignments:
        with mistakes.noted():
            path, equals, text = assignment.partition("=")
            if not equals or not path.strip() or not text.strip():
                raise ConfigError(
                    f"--set {shown(assignment)} must be path=value, such as 'stages[2].mix.groups[1].window=64'"
                )
            if path in overrides:
                raise ConfigError(f"--set gives {path!r} twice, {shown(overrides[path])} and {shown(text)}; keep one")
            try:
                overrides[path] = parse_yaml(text)
            except ValueError as error:
                raise ConfigError(f"--set {path}: {shown(text)} is not a YAML value") from error
    mistakes.told()
    return overrides


def merge_options(file: Mapping[str, Any], given: Mapping[str, Any], *, path: str = "train") -> TrainOptions:
    """Training options from a file's `train` section, overruled by what the command line gave.

    Args:
        file: the section as a plain dict.
        given: options by name; None means not given.
        path: where the section stands, for messages.
    """
    merged = {**file, **{name: value for name, value in given.items() if value is not None}}
    return TrainOptions.from_dict(merged, path=path)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe of training as the user asked for it, checked but with nothing read yet."""

    options: SparsifyingOptions
    teacher: Path


def take_recipe(overrides: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of the recipe, `recipe.NAME`, out of what `--set` gave."""
    names = [path for path in overrides if path.startswith("recipe.")]
    return {path.removeprefix("recipe."): overrides.pop(path) for path in names}


def choose_recipe(
    file: Mapping[str, Any], name: str | None, teacher: Path | None, changes: Mapping[str, Any]
) -> RecipeChoice | None:
    """The recipe of training from a file's `recipe` section, overruled by the command line.

    Args:
        file: the section as a plain dict.
        name: value of `--recipe`.
        teacher: value of `--teacher`.
        changes: options given by `--set recipe.NAME=VALUE`.

    Raises:
        ConfigError: if there is no such recipe, or something is missing or does not fit.
    """
    plain = {**file, **changes}
    kind, place = name or plain.pop("kind", None), teacher or plain.pop("teacher", None)
    plain = {key: value for key, value in plain.items() if key not in ("kind", "teacher")}
    if kind is None:
        if place or plain:
            raise ConfigError("a teacher or options of a recipe need the recipe's name: pass --recipe sparsifiner")
        return None
    if kind != SparsifyingOptions.kind:
        known = (SparsifyingOptions.kind,)
        raise ConfigError(f"unknown recipe {shown(kind)}{did_you_mean(str(kind), known)} (recipes: {', '.join(known)})")
    if not isinstance(place, (str, Path)):
        raise ConfigError(
            f"--recipe {kind} needs --teacher, a checkpoint or the folder of a run of a dense model; train one "
            "with --model vit_micro --out runs/teacher"
        )
    return RecipeChoice(SparsifyingOptions.from_dict(plain, path="recipe"), Path(place))
