"""The one error family: every message shows what was passed and what would be right."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class AttnkitError(ValueError):
    """Base of every error attnkit raises on purpose; also a `ValueError`."""


class ConfigError(AttnkitError):
    """An option, a name or an override that cannot be what was meant."""


class ShapeError(AttnkitError):
    """A tensor, grid or image whose shape, dtype or device does not fit."""


class LayoutError(AttnkitError):
    """A layout that cannot be built, combined or lowered as asked."""


class BackendError(AttnkitError):
    """No backend can run a call, or the one asked for cannot."""


class DataError(AttnkitError):
    """Training or prediction data that cannot be read or used."""


class CheckpointError(AttnkitError):
    """A checkpoint that cannot be written, read or fitted to a model."""


class MissingExtraError(AttnkitError, ImportError):
    """A feature whose optional dependency is not installed."""


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the choice nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(choices), n=3, cutoff=0.5)
    # Of equally near names, swapped letters are likelier than a wrong one.
    close.sort(key=lambda one: sorted(one) != sorted(str(name)))
    return f"; did you mean {close[0]!r}?" if close else ""


def listing(choices: Iterable[str]) -> str:
    """Returns the choices as `'a', 'b', 'c'` for the end of a message."""
    return ", ".join(repr(choice) for choice in choices)


def load_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional dependency on first use.

    Args:
        module: dotted module name, for example `"matplotlib.pyplot"`.
        extra: the extra of this distribution that installs it.
        purpose: what needs it, as the subject of the error sentence (`"drawing"`).

    Raises:
        MissingExtraError: if the module cannot be imported, naming the install command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", maxsplit=1)[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed ({error}); run: pip install 'attnkit[{extra}]'"
        ) from error
