"""Constructors that answer arguments which do not fit with one sentence that names the right ones."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeGuard

from attnkit.errors import AttnkitError, did_you_mean, nearest, shown

# Numbers of tokens, channels and the like stay below this, so that products of two of them are 64-bit integers.
LARGEST = 2**31 - 1


class NamedArguments(ABCMeta):
    """Metaclass under which misspelt, missing and surplus arguments raise `_refusal` instead of a bare TypeError.

    Only a constructor that failed is looked at: good calls pay nothing, and compilers see an ordinary class.
    """

    _refusal: type[AttnkitError] = AttnkitError

    # Type checkers would take this for the signature of every constructor.
    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                found = cls._argument_mistakes(args, kwargs)
                if not found:
                    raise
            raise cls._refusal("; ".join(found))

    @property
    def __signature__(cls) -> Signature:
        # `inspect` would otherwise show the arguments of `__call__`.
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def _argument_mistakes(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Sentences about arguments that do not fit the constructor; none if they do."""
        given, found = cls._named(args, kwargs)
        parameters = [one for one in cls.__signature__.parameters.values() if one.kind is not Parameter.VAR_POSITIONAL]
        required = {one.name: "" for one in parameters if one.default is Parameter.empty}
        return found + name_mistakes(given, [one.name for one in parameters], required, cls.__name__)[0]

    def _named(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Arguments by name, and sentences about those by position that cannot be named."""
        parameters = cls.__signature__.parameters.values()
        if any(one.kind is Parameter.VAR_POSITIONAL for one in parameters):
            return dict(kwargs), []
        places = [one.name for one in parameters if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
        found = []
        if len(args) > len(places):
            takes = f"{', '.join(places)} by position and the others" if places else "its arguments"
            found.append(f"{cls.__name__} takes {takes} by name, but got {len(args)} by position: {shown(tuple(args))}")
        given = dict(zip(places, args, strict=False))
        found += [f"{cls.__name__} got {name!r} twice, by position and by name" for name in given if name in kwargs]
        return {**kwargs, **given}, found


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an integer (a truth value is none), not less than `least` and not above `LARGEST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def name_mistakes(
    given: Iterable[Any], options: Sequence[str], required: Mapping[str, str], label: str
) -> tuple[list[str], dict[Any, str]]:
    """Compares names that were given with those that there are.

    Args:
        given: the names that were given.
        options: all names that there are.
        required: the names that must be given, each with what it should be, if that is known.
        label: whose names they are.

    Returns:
        Sentences about unknown and missing names, and what each unknown one was probably meant to be.
    """
    found: list[str] = []
    meant: dict[Any, str] = {}
    given = list(given)
    for name in given:
        if name not in options:
            close = nearest(name, options)
            if close is not None:
                meant[name] = close
            known = f" (options: {', '.join(options)})" if options else ""
            found.append(f"unknown option {shown(name)} for {label}{did_you_mean(name, options)}{known}")
    for name, wanted in required.items():
        if name not in given and name not in meant.values():
            found.append(f"option {name!r} of {label} is missing{f'; it is {wanted}' if wanted else ''}")
    return found, meant
