"""A small cache for index tables, and for layouts made of them, that depend on sizes only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from attnkit.layouts.base import Layout

    LayoutLike = TypeVar("LayoutLike", bound=Layout)

CAPACITY = 512

_tables: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
_layouts: OrderedDict[Hashable, Layout] = OrderedDict()


def cached(key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Returns `make()`, remembered under `key` (the least recently used of 512 tables is forgotten).

    Inside `torch.compile` and `torch.export` nothing is remembered: the table becomes part of the graph.
    """
    if torch.compiler.is_compiling():
        return make()
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    # A table made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        tables = make()
    if _lasting(tables):
        _tables[key] = tables
        if len(_tables) > CAPACITY:
            _tables.popitem(last=False)
    return tables


def cached_layout(key: Hashable, make: Callable[[], LayoutLike]) -> LayoutLike:
    """The same for a layout, which is checked only when it is made."""
    if torch.compiler.is_compiling():
        return make()
    try:
        found = _layouts.get(key)
    except TypeError:
        # Symbolic sizes have no hash.
        return make()
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        if _lasting(found.tables):
            _layouts[key] = found
            if len(_layouts) > CAPACITY:
                _layouts.popitem(last=False)
    else:
        _layouts.move_to_end(key)
    return found  # type: ignore[return-value]


def device_key(device: torch.device | str | None) -> str:
    """A device as part of a key; without one, the device where PyTorch makes tensors at the moment."""
    if device is None and not torch.compiler.is_compiling():
        device = torch.get_default_device()
    return str(device)


def _lasting(tables: tuple[Tensor, ...]) -> bool:
    """Whether tables may be used later: those of fake modes and function transforms end with them."""
    return all(type(table) is Tensor and not is_functorch_wrapped_tensor(table) for table in tables)


def forget() -> None:
    """Forgets all tables and layouts."""
    _tables.clear()
    _layouts.clear()
