"""How much memory a computation asks for, counted in bytes, the same on every machine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that a computation holds at one time, at most, beyond those that lived before it.

    Counts what is asked of PyTorch's allocator, so also what operators use inside themselves and what a backward pass
    keeps; what a library under PyTorch allocates for itself is not seen. The result of `run` counts too.

    Args:
        run: the computation, called once. A forward and backward pass within it counts as one.
        device: where it computes: `"cpu"` or `"cuda"`.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's own lines about itself, which it would print for every call.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profiled: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profiled:
        # Freed by whoever calls, after the peak was seen.
        kept = run()
    del kept
    events = [one for one in profiled.kineto_results.events() if one.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class TensorMemory(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors that operators return inside it.

    What an operator uses inside itself is not seen. Tensors without content count too.

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
                self._alive.append((weakref.ref(tensor), storage._cdata, storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        self._alive = [one for one in self._alive if one[0]() is not None]
        # Views share a storage, which counts once.
        self.peak = max(self.peak, sum({place: size for _, place, size in self._alive}.values()))
        return found
