"""Primitives: one file per way of choosing keys, with its options, its head group and its paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnkit.primitives.base import BuildContext, Columns, HeadGroup, HeadInputs, HeadOutput, PrimitiveOptions
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions
from attnkit.registry import PRIMITIVES, load

if TYPE_CHECKING:
    from attnkit.primitives import classes
    from attnkit.primitives.classes import *  # noqa: F403

_TARGETS = {target.partition(":")[2]: target for target in PRIMITIVES.values()}

__all__ = [
    "BuildContext",
    "Columns",
    "HeadGroup",
    "HeadInputs",
    "HeadOutput",
    "Plan",
    "PrimitiveOptions",
    "SoftmaxHeads",
    "SoftmaxOptions",
]
if TYPE_CHECKING:
    __all__ += classes.__all__
else:
    __all__ += list(_TARGETS)


def __getattr__(name: str) -> Any:
    if name not in _TARGETS:
        raise AttributeError(f"module 'attnkit.primitives' has no attribute {name!r}")
    globals()[name] = load(_TARGETS[name])
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
