"""Annotations of options' fields: whether a value fits one, and the sentence where it does not."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union

from attnkit.errors import did_you_mean, listing, shown

# Stands for a value that could not be read and about which everything has been said; it fits everywhere.
UNREADABLE: Any = object()

_NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "None"}
_PLURALS = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}


def members(annotation: Any) -> tuple[Any, ...]:
    """The annotations out of which a value must fit one."""
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (Union, types.UnionType) else (annotation,)


def entries(value: Any, annotation: Any) -> list[Any] | None:
    """Annotations of the entries of a list or tuple; None for another value, or where no list of its length fits."""
    for member in members(annotation):
        if typing.get_origin(member) is tuple and isinstance(value, (list, tuple)):
            inner = typing.get_args(member)
            if len(inner) == 2 and inner[1] is Ellipsis:
                return [inner[0]] * len(value)
            if len(inner) == len(value):
                return list(inner)
    return None


def described(annotation: Any) -> str:
    """What a value must be, in words: "an integer or a list of integers"."""
    names = []
    for member in members(annotation):
        inner = typing.get_args(member)
        if typing.get_origin(member) is Literal:
            names.append(f"one of {listing(map(str, inner))}")
        elif typing.get_origin(member) is tuple:
            count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            names.append(f"a list of {count}{_PLURALS.get(inner[0]) or described(inner[0])}")
        elif hasattr(member, "kind"):
            # A class without a kind of its own stands for many: PrimitiveOptions are primitive options.
            name = member.__name__ if member.kind else member.__name__.removesuffix("Options").lower()
            names.append(f"{name} options")
        else:
            names.append(_NOUNS.get(member, str(member)))
    return " or ".join(names)


def mismatches(value: Any, annotation: Any, name: str) -> list[tuple[str, str]]:
    """What is of another type than it should be: where it stands, such as `window[1]`, and what is to be said of it.

    In a list that is one where it should be, only the entries that do not fit are named.
    """
    if any(_fits(value, member) for member in members(annotation)):
        return []
    parts = entries(value, annotation)
    if parts is not None and isinstance(value, tuple):
        pairs = enumerate(zip(value, parts, strict=True))
        return [found for at, (one, part) in pairs for found in mismatches(one, part, f"{name}[{at}]")]
    near = ""
    for member in members(annotation):
        if typing.get_origin(member) is Literal and isinstance(value, str):
            near = did_you_mean(value, map(str, typing.get_args(member)))
    return [(name, f" must be {described(annotation)}, but got {shown(value)}{near}")]


def usable(value: Any, annotation: Any, default: Any) -> Any:
    """What of a value fits: all of it, the entries of a list that do, or a default."""
    parts = entries(value, annotation)
    if parts is not None and isinstance(value, tuple):
        pairs = zip(value, parts, strict=True)
        return tuple(one for one, part in pairs if one is not UNREADABLE and not mismatches(one, part, ""))
    return default if value is UNREADABLE or mismatches(value, annotation, "") else value


def _fits(value: Any, member: Any) -> bool:
    if member is Any or value is UNREADABLE:
        return True
    if member is type(None):
        return value is None
    origin = typing.get_origin(member)
    if origin is Literal:
        # 1 == True, and neither is a name.
        return any(type(value) is type(one) and value == one for one in typing.get_args(member))
    if origin is tuple:
        parts = entries(value, member) if isinstance(value, tuple) else None
        return parts is not None and not any(mismatches(*one, "") for one in zip(value, parts, strict=True))
    # PyTorch's integers have 64 bits, and an integer that is no float either is no number.
    if member is float and isinstance(value, float):
        return True
    if member in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, origin or member)
