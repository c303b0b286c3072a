"""Plain data from YAML and JSON that anyone may have written: no objects, no depth and no size without end."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

DEEPEST = 100
MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number: YAML 1.1 wants a dot in it and would call it a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Reads YAML.

    Raises:
        ValueError: with the reason, if it is not valid, nested too deeply, or stands for too much: a few aliases of
            aliases are enough for more values than any memory holds.
    """
    try:
        plain = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    # What a tag such as !!int or !!timestamp does not accept raises whatever its parsing ran into.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _check(plain, MOST_VALUES)
    return plain


def parse_json(text: str) -> Any:
    """Reads JSON.

    Raises:
        ValueError: with the reason, if it is not valid or nested too deeply.
    """
    try:
        plain = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    _check(plain)
    return plain


def _check(plain: Any, most: float = float("inf")) -> None:
    """Looks at everything without recursion; what contains itself is deep without end."""
    found, waiting = 1, [(plain, 1)]
    while waiting:
        value, depth = waiting.pop()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        found += len(inside)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if found > most:
            raise ValueError(f"it stands for more than {most:,} values once its aliases are written out")
        waiting += [(one, depth + 1) for one in inside]
