"""The laws of attention, one file each: promises that hold for every primitive, layout and backend."""

from __future__ import annotations

from collections.abc import Iterable

from attnkit.errors import ConfigError, did_you_mean
from attnkit.testing.laws import (
    algebra,
    backends_agree,
    convex_hull,
    counting,
    empty_rows,
    equals_dense,
    finite_gradients,
    full_budget,
    independence,
    no_leak,
    options_round_trip,
    seeds_only,
    transformed,
    translation,
)
from attnkit.testing.laws.law import Breach, Law, LawBroken

LAWS: dict[str, Law] = {
    module.LAW.name: module.LAW
    for module in (
        equals_dense,
        backends_agree,
        no_leak,
        full_budget,
        independence,
        convex_hull,
        translation,
        empty_rows,
        algebra,
        options_round_trip,
        transformed,
        seeds_only,
        counting,
        finite_gradients,
    )
}

__all__ = ["LAWS", "Breach", "Law", "LawBroken", "law_named", "laws_named"]


def law_named(name: str | int) -> Law:
    """A law by its name or number.

    Raises:
        ConfigError: if there is none, naming the nearest.
    """
    for law in LAWS.values():
        if name in (law.name, law.number, str(law.number)):
            return law
    raise ConfigError(f"unknown law {name!r}{did_you_mean(name, LAWS)} (laws: {', '.join(LAWS)})")


def laws_named(names: Iterable[str | int] | None) -> list[Law]:
    """Several laws, or all."""
    if names is None:
        return list(LAWS.values())
    return [law_named(name) for name in ([names] if isinstance(names, (str, int)) else names)]
