"""Models made of attnkit's primitives: recipes, one file a paper, on two backbones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnkit_models.checkpoints.exchange import export_official, import_official, import_official_layer
    from attnkit_models.checkpoints.files import read_checkpoint

__all__ = ["export_official", "import_official", "import_official_layer", "read_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'attnkit_models' has no attribute {name!r}")
    home = "files" if name == "read_checkpoint" else "exchange"
    value = getattr(importlib.import_module(f"attnkit_models.checkpoints.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
