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


class PrimitiveError(ConfigError, ShapeError):
    """A primitive's own mistake: a plan, an output or columns that are not what the interface asks for."""


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


def nearest(name: object, choices: Iterable[str]) -> str | None:
    """Returns the choice nearest to `name`, or None where none is near."""
    close = difflib.get_close_matches(str(name), list(choices), n=3, cutoff=0.5)
    # Of equally near names, swapped letters are likelier than a wrong one.
    close.sort(key=lambda one: sorted(one) != sorted(str(name)))
    return close[0] if close else None


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the choice nearest to `name`, or an empty string."""
    close = nearest(name, choices)
    return "" if close is None else f"; did you mean {close!r}?"


def listing(choices: Iterable[str]) -> str:
    """Returns the choices as `'a', 'b', 'c'` for the end of a message."""
    return ", ".join(repr(choice) for choice in choices)


def shown(value: object, most: int = 100) -> str:
    """Returns a value for a message: one line, cut in the middle where it is long; tensors by dtype and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and shape and dtype is not None:
        name = type(value).__name__
        return f"{'' if name == 'Tensor' else name + ' '}{dtype} {tuple(shape)}"
    try:
        text = " ".join(repr(value).split())
    except RecursionError:
        return f"a {type(value).__name__} nested without end"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


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
