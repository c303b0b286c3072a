"""Random options of any registered primitive, as a function of a seed."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from typing import Any, Literal, Union

from attnkit.errors import ConfigError, shown
from attnkit.options import field_types
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import primitive_class

_ATTEMPTS = 10_000


def random_options(name: str, *, seed: int = 0, heads: int | None = None, **fixed: Any) -> PrimitiveOptions:
    """Makes valid options of a primitive; every field is drawn by its type, and what is refused is drawn again.

    Args:
        name: a registered primitive, the built-in ones or a third party's.
        seed: any integer; equal seeds give equal options.
        heads: number of heads; 1..4 where not given.
        **fixed: fields that are not drawn.

    Raises:
        ConfigError: for an unknown name, or if nothing drawn was ever accepted.
    """
    cls = typing.cast("type[PrimitiveOptions]", primitive_class(name))
    dice = random.Random(f"{name} {seed}")
    known = field_types(cls)
    for _ in range(_ATTEMPTS):
        drawn = {
            field.name: _draw(known[field.name], dice)
            for field in dataclasses.fields(cls)
            # Defaults are what people use most.
            if field.default is dataclasses.MISSING or dice.random() < 0.5
        }
        drawn["heads"] = dice.randint(1, 4) if heads is None else heads
        try:
            return cls(**{**drawn, **fixed})
        except ConfigError:
            continue
    given = shown({"heads": heads, **fixed})
    raise ConfigError(f"no options of {name!r} with {given} were accepted in {_ATTEMPTS} attempts")


def _draw(annotation: Any, dice: random.Random) -> Any:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _draw(dice.choice(inner), dice)
    if origin is Literal:
        return dice.choice(inner)
    if origin is tuple:
        parts = [inner[0]] * 2 if len(inner) == 2 and inner[1] is Ellipsis else inner
        return tuple(_draw(part, dice) for part in parts)
    simple = {
        int: lambda: dice.randint(1, 7),
        float: lambda: dice.uniform(0.01, 1.0),
        bool: lambda: dice.random() < 0.5,
    }
    return simple[annotation]() if annotation in simple else None
