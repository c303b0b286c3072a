"""Options: frozen dataclasses that become plain dicts and come back, with every mistake named."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from attnkit.annotations import UNREADABLE, described, entries, members, mismatches, usable
from attnkit.arguments import LARGEST, NamedArguments, name_mistakes
from attnkit.errors import ConfigError, did_you_mean, listing, shown

Self = TypeVar("Self", bound="Options")


class _OptionsMeta(NamedArguments):
    """Beside the arguments that do not fit, mistakes in the values of the others are told."""

    def _argument_mistakes(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        options = typing.cast("type[Options]", cls)
        given, found = cls._named(args, kwargs)
        names, meant = name_mistakes(given, list(field_types(options)), _required(options), cls.__name__)
        if not found and not names:
            return []
        values = {name: _tuples(value) for name, value in given.items() if name in field_types(options)}
        more = _complaints(options, values, {meant[name]: _tuples(given[name]) for name in meant})
        return [*found, *names, *(_of_class(options, *one) for one in more)]


@dataclasses.dataclass(frozen=True)
class Options(metaclass=_OptionsMeta):
    """Base of everything that can be written as a plain dict.

    A subclass is a frozen dataclass with a class attribute `kind`, the name under which a dict names it. Checks that
    need one field or several go into `problems`, so that all mistakes are reported together.
    """

    _refusal = ConfigError

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls = type(self)
        for name in field_types(cls):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, _tuples(value))
        found = _complaints(cls, {name: getattr(self, name) for name in field_types(cls)}, made=self)
        if found:
            raise ConfigError("; ".join(_of_class(cls, *one) for one in found))

    def problems(self) -> list[str]:
        """Sentences about fields that do not fit, each beginning `name=value: `; empty when all is well."""
        return []

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Returns a plain dict (JSON types only) with `kind` first.

        Args:
            full: also write fields that hold their default.
        """
        plain: dict[str, Any] = {"kind": self.kind} if self.kind else {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if full or value != _default(field):
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
            raise ConfigError(
                f"{path or cls.__name__}: options come as a dict of names to values, but got {shown(plain)}"
            )
        errors: list[str] = []
        options = _read(plain, cls, path, errors)
        if errors:
            raise ConfigError("; ".join(errors))
        return options


def positive(**values: int | None) -> list[str]:
    """Problems for integers that must be >= 1 and not absurdly large (None passes)."""
    wrong = {name: value for name, value in values.items() if value is not None and not 1 <= value <= LARGEST}
    return [f"{name}={value}: must be {'>= 1' if value < 1 else f'<= {LARGEST}'}" for name, value in wrong.items()]


def odd(**values: int | tuple[int, ...]) -> list[str]:
    """Problems for window sizes that need a centre: odd and >= 1."""
    found = []
    for name, value in values.items():
        each = (value,) if isinstance(value, int) else value
        found += [text for one in each if one > LARGEST for text in positive(**{name: one})]
        if not all(one >= 1 and one % 2 for one in each):
            found.append(f"{name}={value}: must be odd and >= 1, such as 3, 5 or 7")
    return found


def among(choices: tuple[str, ...], **values: str) -> list[str]:
    """Problems for names out of a fixed list."""
    return [
        f"{name}={shown(value)}: must be one of {listing(choices)}{did_you_mean(value, choices)}"
        for name, value in values.items()
        if value not in choices
    ]


@functools.cache
def field_types(cls: type[Options]) -> dict[str, Any]:
    """Resolved annotations of the dataclass fields, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def changed(
    options: Self, changes: Mapping[str, Any], path: str, errors: list[str], *, wrong: Collection[str] = ()
) -> Self:
    """Options with other values of some fields; as they were, with sentences in `errors`, where those do not fit.

    Args:
        options: what to change.
        changes: field names to values, plain ones too.
        path: where the options stand in larger ones, for messages.
        errors: sentences about mistakes are added to it.
        wrong: changed fields about which everything has been said.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)} | dict(changes)
    instead = {name: values.pop(name) for name in wrong}
    made = _assembled(type(options), values, path, errors, instead)
    return options if made is UNREADABLE else made


def read_value(value: Any, annotation: Any, path: str, errors: list[str]) -> Any:
    """The value of a field, options and lists in it made from plain data; mistakes are added to `errors`."""
    made = _read_value(value, annotation, path, errors)
    errors += [_at_path("", *one) for one in mismatches(made, annotation, path)]
    return made


_resolvers: list[Callable[[str, type[Options], str], type[Options]]] = []


def resolve_kinds_with(resolver: Callable[[str, type[Options], str], type[Options]]) -> None:
    """Lets the registry say which class a `kind` names: resolver(kind, base class, path) -> class."""
    _resolvers[:] = [resolver]


def _default(field: dataclasses.Field) -> Any:
    """A field's default; `MISSING` where it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _required(cls: type[Options]) -> dict[str, str]:
    """The fields without a default, each with what it is."""
    names = [field.name for field in dataclasses.fields(cls) if _default(field) is dataclasses.MISSING]
    return {name: described(field_types(cls)[name]) for name in names}


def _tuples(value: Any, levels: int = 10) -> Any:
    """Lists as tuples; deeper than any field goes they stay as they are."""
    convert = isinstance(value, (list, tuple)) and levels
    return tuple(_tuples(one, levels - 1) for one in value) if convert else value


def _plain(value: Any, full: bool) -> Any:
    if isinstance(value, Options):
        return value.to_dict(full=full)
    if isinstance(value, (list, tuple)):
        return [_plain(one, full) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one, full) for key, one in value.items()}
    return value


def _complaints(
    cls: type[Options],
    values: Mapping[str, Any],
    instead: Mapping[str, Any] | None = None,
    *,
    made: Options | None = None,
) -> list[tuple[str, str]]:
    """All that does not fit among the values of fields: where, such as `window` or `heads=0`, and what is to be said.

    Args:
        cls: whose fields they are.
        values: field names to values; some may be missing.
        instead: values of further fields, about which everything has been said.
        made: the options that have these values, where there are any.
    """
    found, good = [], set()
    for name, annotation in field_types(cls).items():
        if name in values:
            wrong = mismatches(values[name], annotation, name)
            found += wrong
            if not wrong and not _unreadable(values[name]):
                good.add(name)
    if made is not None and not found:
        texts = made.problems()
    else:
        texts = _problems_of(cls, {**values, **(instead or {})}, good)
    for text in texts:
        place, colon, sentence = text.partition(": ")
        found.append((place, colon + sentence) if colon else ("", text))
    return found


def _problems_of(cls: type[Options], values: Mapping[str, Any], good: Collection[str]) -> list[str]:
    """The problems of the good ones among the values of fields."""
    try:
        made = cls.__new__(cls)
        for field in dataclasses.fields(cls):
            default = _default(field)
            # What has no default is nearly always a number.
            default = 1 if default is dataclasses.MISSING else default
            value = usable(values.get(field.name, UNREADABLE), field_types(cls)[field.name], default)
            object.__setattr__(made, field.name, value)
        return [text for text in made.problems() if re.split(r"\W", text, maxsplit=1)[0] in good]
    except Exception:
        # Nobody promised that the good values go together with the ones that were put in place of the others.
        return []


def _of_class(cls: type[Options], place: str, sentence: str) -> str:
    """A complaint about an argument: `Dense(heads=0): must be >= 1`."""
    if not place:
        return f"{cls.__name__}: {sentence}"
    return f"{cls.__name__}({place if '=' in place else f'{place}=...'}){sentence}"


def _at_path(path: str, place: str, sentence: str) -> str:
    """A complaint about an entry of a dict: `mix.groups[1].heads=0: must be >= 1`."""
    where = f"{path}.{place}" if path and place else path or place
    return where + sentence if place or not where else f"{where}: {sentence}"


def _unreadable(value: Any) -> bool:
    return value is UNREADABLE or (isinstance(value, tuple) and any(map(_unreadable, value)))


def _read_value(value: Any, annotation: Any, path: str, errors: list[str]) -> Any:
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, Options) and isinstance(value, Mapping):
            return _read(value, member, path, errors)
    parts = entries(value, annotation)
    if parts is None:
        return value
    pairs = enumerate(zip(value, parts, strict=True))
    return tuple(_read_value(one, part, f"{path}[{at}]", errors) for at, (one, part) in pairs)


def _read(plain: Mapping[str, Any], cls: type[Self], path: str, errors: list[str]) -> Self:
    where = f"{path}: " if path else ""
    fields = dict(plain)
    kind = fields.pop("kind", None)
    try:
        if kind is not None and (kind != cls.kind or not cls.kind) and _resolvers:
            cls = typing.cast("type[Self]", _resolvers[0](kind, cls, path))
        elif kind is None and not cls.kind:
            raise ConfigError(f"{where}'kind' is missing, so nothing says which options {shown(plain)} are")
    except ConfigError as error:
        errors.append(str(error))
        return UNREADABLE
    known = field_types(cls)
    names, meant = name_mistakes(fields, list(known), _required(cls), repr(cls.kind or cls.__name__))
    errors += [where + text for text in names]
    values = {name: value for name, value in fields.items() if name in known}
    made = _assembled(cls, values, path, errors, {meant[name]: _tuples(fields[name]) for name in meant})
    return UNREADABLE if names else made


def _assembled(
    cls: type[Self], plain: Mapping[str, Any], path: str, errors: list[str], instead: Mapping[str, Any]
) -> Self:
    """Options from plain values of fields; `UNREADABLE`, with sentences in `errors`, where they do not fit."""
    before = len(errors)
    types = field_types(cls)
    values = {
        name: _read_value(value, types[name], f"{path}.{name}" if path else name, errors)
        for name, value in plain.items()
    }
    errors += [_at_path(path, *one) for one in _complaints(cls, values, instead)]
    if len(errors) > before or instead or not _required(cls).keys() <= values.keys():
        return UNREADABLE
    try:
        return cls(**values)
    except ConfigError as error:
        errors.append(f"{path}: {error}" if path else str(error))
        return UNREADABLE
