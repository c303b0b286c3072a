"""TensorMemory: how much memory a computation asks for, counted in bytes, the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors that operators return inside it.

    What an operator uses inside itself is not seen.

    Attributes:
        largest: bytes of the largest tensor.
        peak: bytes of all tensors that live at one time, at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self._alive: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        self._alive = [one for one in self._alive if one[0]() is not None]
        # Views share a storage, which counts once.
        self.peak = max(self.peak, sum({place: size for _, place, size in self._alive}.values()))
        return found
