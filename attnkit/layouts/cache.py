"""A small cache for index tables that depend on sizes only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

CAPACITY = 512

_tables: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()


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
    if all(type(table) is Tensor for table in tables):
        _tables[key] = tables
        if len(_tables) > CAPACITY:
            _tables.popitem(last=False)
    return tables


def forget() -> None:
    """Forgets all tables."""
    _tables.clear()
