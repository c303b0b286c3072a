"""What is told of one model in the table at the end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's result and cost.

    Args:
        model: its name.
        val_accuracy: accuracy on the held-out images, in [0, 1], after the last epoch.
        best_val_accuracy: the highest of any epoch.
        best_epoch: the first epoch that reached it; None for a model that was not trained in this run.
        parameters: number of parameters.
        macs: multiply-accumulates for one image.
        attention_macs: those of the head groups: attention, and what chooses its keys.
        seconds_per_epoch: median over the epochs, or None.
        peak_memory_mb: in 10^6 bytes, or None where it is not known.
        peak_memory_exact: whether that peak belongs to this model alone.
    """

    model: str
    val_accuracy: float
    best_val_accuracy: float
    best_epoch: int | None = None
    parameters: int
    macs: int
    attention_macs: int
    seconds_per_epoch: float | None = None
    peak_memory_mb: float | None = None
    peak_memory_exact: bool = True

    def against(self, other: Row) -> str:
        """What this model lost and saved against another, in a sentence."""
        points = 100 * (self.val_accuracy - other.val_accuracy)
        return (
            f"{self.model} against {other.model}: {points:+.2f} points of test accuracy; "
            f"{_change(other.attention_macs, self.attention_macs)} MACs in attention and the choice of its keys; "
            f"{_change(other.macs, self.macs)} in the whole model"
        )


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}{f' ({after / before - 1:+.1%})' if before else ''}"
