"""attnkit: attention primitives that anyone combines freely into heads, blocks and models.

One idea: *which keys a query sees* (a layout, plain data whose meaning is `to_mask()`) is separate from *how softmax
over them is computed* (a backend).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnkit.errors import AttnkitError
from attnkit.registry import PRIMITIVES, list_models, list_primitives, register_primitive

if TYPE_CHECKING:
    from attnkit import analysis, errors, kernels, layouts, primitives, testing
    from attnkit.analysis import draw, explain, flops
    from attnkit.blocks import MLP, Block
    from attnkit.factory import build
    from attnkit.grid import Grid
    from attnkit.heads import HeadMix
    from attnkit.kernels import attend, use_backend
    from attnkit.mixes import Mix
    from attnkit.primitives import classes
    from attnkit.primitives.classes import *  # noqa: F403

__version__ = "0.1.0"

_PLACES = {
    "attnkit.analysis": ("draw", "explain", "flops"),
    "attnkit.blocks": ("MLP", "Block"),
    "attnkit.factory": ("build",),
    "attnkit.grid": ("Grid",),
    "attnkit.heads": ("HeadMix",),
    "attnkit.kernels": ("attend", "use_backend"),
    "attnkit.mixes": ("Mix",),
}
_HOMES = {name: module for module, names in _PLACES.items() for name in names}
_PRIMITIVES = {name: module for module, _, name in (target.partition(":") for target in PRIMITIVES.values())}
_MODULES = ("analysis", "errors", "kernels", "layouts", "primitives", "testing")

__all__ = [
    "MLP",
    "AttnkitError",
    "Block",
    "Grid",
    "HeadMix",
    "Mix",
    "analysis",
    "attend",
    "build",
    "draw",
    "errors",
    "explain",
    "flops",
    "kernels",
    "layouts",
    "list_models",
    "list_primitives",
    "primitives",
    "register_primitive",
    "testing",
    "use_backend",
]
if TYPE_CHECKING:
    __all__ += classes.__all__
else:
    __all__ += list(_PRIMITIVES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _PRIMITIVES.get(name)
    if home is not None:
        value = getattr(importlib.import_module(home), name)
    elif name in _MODULES:
        value = importlib.import_module(f"attnkit.{name}")
    else:
        raise AttributeError(f"module 'attnkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
