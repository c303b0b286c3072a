"""Options: frozen dataclasses that become plain dicts and come back, with every mistake named."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from attnkit.errors import ConfigError, did_you_mean, listing

Self = TypeVar("Self", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of everything that can be written as a plain dict.

    A subclass is a frozen dataclass with a class attribute `kind`, the name under which a dict names it. Checks that
    need one field or several go into `problems`, so that all mistakes are reported together.
    """

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, annotation in field_types(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, _tuples(value))
                value = getattr(self, name)
            problem = _mismatch(value, annotation)
            if problem:
                raise ConfigError(f"{type(self).__name__}({name}=...) {problem}")
        found = self.problems()
        if found:
            raise ConfigError("; ".join(f"{type(self).__name__}({text})" for text in found))

    def problems(self) -> list[str]:
        """Sentences about fields that do not fit, each beginning `name=value`; empty when all is well."""
        return []

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Returns a plain dict (JSON types only) with `kind` first.

        Args:
            full: also write fields that hold their default.
        """
        plain: dict[str, Any] = {"kind": self.kind} if self.kind else {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if full or _required(field) or value != _default(field):
                plain[field.name] = _plain(value, full)
        return plain

    @classmethod
    def from_dict(cls: type[Self], plain: Mapping[str, Any], *, path: str = "") -> Self:
        """Builds options from a plain dict.

        Args:
            plain: field names to values; `kind` may stand in it and must then be this class's.
            path: where the dict stands in a larger one, for messages.

        Raises:
            ConfigError: with every mistake found, each with its path and the nearest right name.
        """
        if not isinstance(plain, Mapping):
            raise ConfigError(f"{path or cls.__name__}: options come as a dict of names to values, but got {plain!r}")
        errors: list[str] = []
        options = _read(plain, cls, path, errors)
        if errors:
            raise ConfigError("; ".join(errors))
        return options


def positive(**values: int | None) -> list[str]:
    """Problems for integers that must be >= 1 (None passes)."""
    return [f"{name}={value}: must be >= 1" for name, value in values.items() if value is not None and value < 1]


def odd(**values: int | tuple[int, ...]) -> list[str]:
    """Problems for window sizes that need a centre: odd and >= 1."""
    found = []
    for name, value in values.items():
        each = (value,) if isinstance(value, int) else value
        if not all(one >= 1 and one % 2 for one in each):
            found.append(f"{name}={value}: must be odd and >= 1, such as 3, 5 or 7")
    return found


def among(choices: tuple[str, ...], **values: str) -> list[str]:
    """Problems for names out of a fixed list."""
    return [
        f"{name}={value!r}: must be one of {listing(choices)}{did_you_mean(value, choices)}"
        for name, value in values.items()
        if value not in choices
    ]


@functools.cache
def field_types(cls: type[Options]) -> dict[str, Any]:
    """Resolved annotations of the dataclass fields, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_resolvers: list[Callable[[str, type[Options], str], type[Options]]] = []


def resolve_kinds_with(resolver: Callable[[str, type[Options], str], type[Options]]) -> None:
    """Lets the registry say which class a `kind` names: resolver(kind, base class, path) -> class."""
    _resolvers[:] = [resolver]


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any, full: bool) -> Any:
    if isinstance(value, Options):
        return value.to_dict(full=full)
    if isinstance(value, (list, tuple)):
        return [_plain(one, full) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one, full) for key, one in value.items()}
    return value


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (Union, types.UnionType) else (annotation,)


def _described(annotation: Any) -> str:
    names = []
    for member in _members(annotation):
        if member is type(None):
            names.append("None")
        elif typing.get_origin(member) is Literal:
            names.append("one of " + listing(map(str, typing.get_args(member))))
        elif typing.get_origin(member) is tuple:
            inner = typing.get_args(member)
            names.append(f"a list of {_described(inner[0])}")
        elif isinstance(member, type) and issubclass(member, Options):
            names.append(f"{member.__name__} options")
        else:
            names.append(
                {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(member, str(member))
            )
    return " or ".join(names)


def _fits(value: Any, member: Any) -> bool:
    if member is Any:
        return True
    if member is type(None):
        return value is None
    origin = typing.get_origin(member)
    if origin is Literal:
        return value in typing.get_args(member)
    if origin is tuple:
        inner = typing.get_args(member)
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(any(_fits(one, option) for option in _members(inner[0])) for one in value)
        return len(value) == len(inner) and all(
            any(_fits(one, option) for option in _members(part)) for one, part in zip(value, inner, strict=True)
        )
    if member is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, member)


def _mismatch(value: Any, annotation: Any) -> str:
    members = _members(annotation)
    if any(_fits(value, member) for member in members):
        return ""
    near = ""
    for member in members:
        if typing.get_origin(member) is Literal and isinstance(value, str):
            near = did_you_mean(value, map(str, typing.get_args(member)))
    return f"must be {_described(annotation)}, but got {value!r}{near}"


def _options_class(annotation: Any) -> type[Options] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Options):
            return member
    return None


def _read_value(value: Any, annotation: Any, path: str, errors: list[str]) -> Any:
    base = _options_class(annotation)
    if base is not None and isinstance(value, Mapping):
        return _read(value, base, path, errors)
    for member in _members(annotation):
        if typing.get_origin(member) is tuple and isinstance(value, (list, tuple)):
            inner = typing.get_args(member)
            parts = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
            if len(parts) == len(value):
                return tuple(
                    _read_value(one, part, f"{path}[{index}]", errors)
                    for index, (one, part) in enumerate(zip(value, parts, strict=True))
                )
    return value


def _read(plain: Mapping[str, Any], cls: type[Self], path: str, errors: list[str]) -> Self:
    where = f"{path}: " if path else ""
    fields = dict(plain)
    kind = fields.pop("kind", None)
    try:
        if kind is not None and kind != cls.kind and _resolvers:
            cls = typing.cast("type[Self]", _resolvers[0](kind, cls, path))
        elif kind is None and not cls.kind:
            raise ConfigError(f"{where}'kind' is missing, so nothing says which options {plain!r} are")
    except ConfigError as error:
        errors.append(str(error))
        return typing.cast("Self", None)
    known = field_types(cls)
    label = cls.kind or cls.__name__
    unknown = [name for name in fields if name not in known]
    for name in unknown:
        errors.append(
            f"{where}unknown option {name!r} for {label!r}{did_you_mean(name, known)} (options: {', '.join(known)})"
        )
    before = len(errors)
    ready: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in fields:
            meant = any(repr(field.name) in did_you_mean(name, known) for name in unknown)
            if _required(field) and not meant:
                errors.append(
                    f"{where}option {field.name!r} of {label!r} is missing; it is {_described(known[field.name])}"
                )
            continue
        inner = f"{path}.{field.name}" if path else field.name
        count = len(errors)
        ready[field.name] = _read_value(fields[field.name], known[field.name], inner, errors)
        if len(errors) == count:
            problem = _mismatch(ready[field.name], known[field.name])
            if problem:
                errors.append(f"{inner} {problem}")
    if unknown or len(errors) > before:
        return typing.cast("Self", None)
    try:
        return cls(**ready)
    except ConfigError as error:
        errors.append(f"{where}{error}")
        return typing.cast("Self", None)
