"""The table at the end: what each model reached, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from attnkit_models.train.resume import Progress
from attnkit_models.train.row import Row
from attnkit_models.train.task import Task


@dataclass(frozen=True)
class Summary:
    """One model's result.

    Args:
        task: what was trained.
        progress: its finished training.
        memory: what its peak memory was measured of.
        exact_memory: whether that peak belongs to this model alone.
    """

    task: Task
    progress: Progress
    memory: str
    exact_memory: bool = True

    @property
    def row(self) -> Row:
        """The table's row."""
        history = self.progress.history
        best = self.progress.best or history[-1]
        peaks = [record["peak_memory_mb"] for record in history if record["peak_memory_mb"] is not None]
        return Row(
            model=self.task.label,
            val_accuracy=history[-1]["val_accuracy"],
            best_val_accuracy=best["val_accuracy"],
            best_epoch=best["epoch"],
            parameters=self.task.parameters,
            macs=self.task.macs,
            attention_macs=self.task.attention_macs,
            seconds_per_epoch=round(median(record["seconds"] for record in history), 3),
            peak_memory_mb=max(peaks) if peaks else None,
            peak_memory_exact=self.exact_memory,
        )


def show_table(rows: Sequence[Row], memory: str, console: Console) -> None:
    """Prints the rows side by side, each model a column.

    Args:
        rows: one a model.
        memory: what peak memory was measured of.
        console: where to print.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row.model, justify="right")

    def add(head: str, cells: list[str]) -> None:
        table.add_row(head, *cells)

    add("test accuracy, last epoch", [f"{row.val_accuracy:.2%}" for row in rows])
    add("test accuracy, best epoch", [_best(row) for row in rows])
    add("parameters", [f"{row.parameters:,}" for row in rows])
    add("MACs an image", [f"{row.macs:,}" for row in rows])
    add("of these in head groups", [f"{row.attention_macs:,}" for row in rows])
    add("seconds an epoch", ["" if row.best_epoch is None else f"{row.seconds_per_epoch:.2f}" for row in rows])
    add(f"peak memory, {memory}", [_megabytes(row) for row in rows])
    console.print(table)


def _best(row: Row) -> str:
    return "" if row.best_epoch is None else f"{row.best_val_accuracy:.2%} ({row.best_epoch})"


def _megabytes(row: Row) -> str:
    if row.best_epoch is None:
        return ""
    if row.peak_memory_mb is None:
        return "unknown"
    return f"{'' if row.peak_memory_exact else 'at most '}{row.peak_memory_mb:,.0f} MB"
