"""Numbers of random draws: one more for each training pass, the same again for a pass that checkpointing repeats."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import AttnkitError


class DrawCounter:
    """Counts training passes, and gives a checkpointed region that is run a second time the number of its first run.

    A model calls `next` outside of checkpointed regions and passes the number in. Where that was not done, a second
    run takes the number of the first as long as only one is pending. The count itself is the caller's buffer, so that
    it lies in the state dict.
    """

    def __init__(self) -> None:
        # Passes inside a non-reentrant checkpoint, each with one of the hooks that live as long as its graph.
        self._hooked: list[tuple[Callable[[], Any], Tensor]] = []
        # Passes inside a reentrant checkpoint, whose graph nobody can see from here.
        self._hidden: list[Tensor] = []
        self._hidden_done = False

    def __reduce__(self) -> tuple[type[DrawCounter], tuple[()]]:
        # No region runs a copy again that ran the original first.
        return DrawCounter, ()

    @property
    def pending(self) -> int:
        """Number of passes that may still be run again; more than two reentrant ones count as two."""
        return len(self._found())

    def next(self, draws: Tensor) -> Tensor:
        """Adds one to `draws`, an int64 scalar, and returns what it was before; or a pending number once more.

        Raises:
            AttnkitError: if a region is run again and it is not one single pass that this may be.
        """
        if torch.compiler.is_compiling():
            return _counted(draws)
        if torch._C._current_graph_task_id() != -1:
            return self._again()
        draw = _counted(draws)
        packing = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        hidden = _inside_function()
        if hidden or packing is not None:
            self._forget()
            if hidden:
                self._hidden = [*self._hidden, draw][-2:]
            else:
                self._hooked.append((weakref.ref(packing[1]), draw))
        return draw

    def _forget(self) -> None:
        """Drops the passes that nothing can run again."""
        self._hooked = [(hook, draw) for hook, draw in self._hooked if hook() is not None]
        if self._hidden_done:
            self._hidden, self._hidden_done = [], False

    def _found(self) -> list[Tensor]:
        return [draw for hook, draw in self._hooked if hook() is not None] + self._hidden

    def _again(self) -> Tensor:
        found = self._found()
        # A reentrant region is one node of the graph: it has run for the last time unless the graph is retained.
        keeping = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        self._hidden_done = self._hidden_done or not keeping
        if len(found) != 1:
            raise AttnkitError(
                f"a checkpointed region with random windows is run again while {len(found)} of its training passes "
                f"are pending; call draw = mix.next_draw() before the region and pass draw=draw into it"
            )
        return found[0]


def _counted(draws: Tensor) -> Tensor:
    draw = draws.clone()
    if torch.compiler.is_compiling():
        # A compiled region that is run again would otherwise read the count once more, after it was raised (PyTorch's
        # pull request 197039 is to change that). A running sum, here of one number, is kept instead.
        draw = draw.reshape(1).cumsum(0)[0]
    draws += 1
    return draw


def _inside_function() -> bool:
    """Whether this is the forward of an autograd function, as everything is in a reentrant checkpoint's first run.

    PyTorch turns forward-mode differentiation off there, which `torch.no_grad` does not.
    """
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()  # pyright: ignore[reportAttributeAccessIssue]
