"""Numbers of random draws: one more for each training pass, the same again for a pass that checkpointing repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.errors import AttnkitError


class DrawCounter:
    """Counts training passes, and gives a checkpointed region that is run a second time the number of its first run.

    A model calls `next` outside of checkpointed regions and passes the number in. Where that was not done, a second
    run takes the number of the first as long as only one is pending. The count itself is the caller's buffer, so that
    it lies in the state dict.

    Attributes:
        pending: number of passes that may still be run again.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._draw: Tensor | None = None
        self._repeated = False

    def next(self, draws: Tensor) -> Tensor:
        """Adds one to `draws`, an int64 scalar, and returns what it was before; or a pending number once more.

        Raises:
            AttnkitError: if a region is run again while several passes are pending, so that nobody knows which it was.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            return self._again()
        draw = draws.clone()
        draws += 1
        if not compiling and _may_run_again():
            self.pending = 1 if self._repeated else self.pending + 1
            self._repeated, self._draw = False, draw
        return draw

    def _again(self) -> Tensor:
        self._repeated = True
        if self.pending != 1 or self._draw is None:
            raise AttnkitError(
                f"a checkpointed region with random windows is run again while {self.pending} of its training passes "
                f"are pending; call draw = mix.next_draw() before the region and pass draw=draw into it"
            )
        return self._draw


def _may_run_again() -> bool:
    """Whether activation checkpointing may be around: it runs without gradients, or packs what autograd saves."""
    packing = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return packing is not None or not torch.is_grad_enabled()
