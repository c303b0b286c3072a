"""A small cache for index tables, and for layouts made of them, that depend on sizes only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from attnkit.layouts.base import Layout

    LayoutLike = TypeVar("LayoutLike", bound=Layout)

Made = TypeVar("Made")

# A table of a large map's pairs alone may hold tens of megabytes.
CAPACITY = 512
BYTES = 2**28


class _Kept(NamedTuple):
    """A value, its tensors and how often each of them had been written to when it was made."""

    value: object
    tables: tuple[Tensor, ...]
    versions: list[int]
    size: int

    @property
    def unchanged(self) -> bool:
        return [table._version for table in self.tables] == self.versions

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being captured that would read its tensors in each replay."""
        return any(table.is_cuda for table in self.tables) and torch.cuda.is_current_stream_capturing()


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
# Those that captured graphs read: nobody tells when a graph ends, and until then their memory must stay theirs.
_held: dict[int, _Kept] = {}
_lock = threading.Lock()


def cached(key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Returns `make()`, remembered under `key`.

    The least recently used is forgotten beyond 512 of them or 256 MiB in all, and one whose tensors were written to is
    made anew. Inside `torch.compile` and `torch.export` nothing is remembered: the table becomes part of the graph.
    """
    if torch.compiler.is_compiling():
        return make()
    found = _remembered(key)
    if found is None:
        found = _made(make)
        _remember(key, found, found)
    return found  # type: ignore[return-value]


def cached_layout(key: Hashable, make: Callable[[], LayoutLike]) -> LayoutLike:
    """The same for a layout, which is checked only when it is made."""
    if torch.compiler.is_compiling():
        return make()
    found = _remembered(key)
    if found is None:
        found = _made(make)
        if _remember(key, found, found.tables):
            object.__setattr__(found, "made_of", key)
    return found  # type: ignore[return-value]


def device_key(device: torch.device | str | None) -> str:
    """A device as part of a key; without one, the device where PyTorch makes tensors at the moment."""
    if device is None and not torch.compiler.is_compiling():
        device = torch.get_default_device()
    return str(device)


def forget() -> None:
    """Forgets all tables and layouts."""
    with _lock:
        _kept.clear()


def _remembered(key: Hashable) -> object | None:
    try:
        with _lock:
            kept = _kept.get(key)
            if kept is not None:
                _kept.move_to_end(key)
    except TypeError:
        # Symbolic sizes have no hash.
        return None
    if kept is None or not kept.unchanged or _pretending():
        return None
    if kept.captured:
        _held[id(kept)] = kept
    return kept.value


def _made(make: Callable[[], Made]) -> Made:
    # A table made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _remember(key: Hashable, value: object, tables: tuple[Tensor, ...]) -> bool:
    """Keeps a value, unless its tables end with the fake mode or the function transform they were made in."""
    size = sum(table.numel() * table.element_size() for table in tables)
    lasting = all(type(table) is Tensor and not is_functorch_wrapped_tensor(table) for table in tables)
    if not lasting or size > BYTES or _pretending():
        return False
    kept = _Kept(value, tables, [table._version for table in tables], size)
    if kept.captured:
        # What is made in a graph has no numbers until that is replayed, and lies in its memory.
        return False
    try:
        with _lock:
            _kept[key] = kept
            _kept.move_to_end(key)
            while len(_kept) > CAPACITY or sum(one.size for one in _kept.values()) > BYTES:
                _kept.popitem(last=False)
    except TypeError:
        return False
    return True


def _pretending() -> bool:
    """Whether tensors are fake ones, which do not mix with those kept."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
