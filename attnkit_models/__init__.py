"""Models made of attnkit's primitives: recipes, one file a paper, on two backbones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnkit_models.checkpoints.exchange import export_official, import_official, import_official_layer

__all__ = ["export_official", "import_official", "import_official_layer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'attnkit_models' has no attribute {name!r}")
    value = getattr(importlib.import_module("attnkit_models.checkpoints.exchange"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
