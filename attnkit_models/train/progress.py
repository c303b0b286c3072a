"""What a person sees while training: a bar in a terminal, one line an epoch everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "- images/s", style="progress.data.speed")


class Reporter:
    """Prints for the main process and keeps quiet in the others.

    Args:
        main: whether this is the main process.
        console: where to print; standard output if None.
    """

    def __init__(self, *, main: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(quiet=not main)
        self.main = main
        self._bar: tuple[Progress, TaskID] | None = None

    def say(self, text: str) -> None:
        """Prints one line."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable, total: int) -> Iterable:
        """Iterates with a bar while images are being checked."""
        if not (self.main and self.console.is_terminal):
            return items
        return track(items, description="checking images", total=total, console=self.console, transient=True)

    @contextmanager
    def training(self, label: str, *, images: int, done: int) -> Iterator[None]:
        """Shows a bar over a whole training, counted in images."""
        if not (self.main and self.console.is_terminal):
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            self._bar = (bar, bar.add_task(label, total=images, completed=done))
            try:
                yield
            finally:
                self._bar = None

    def tick(self, images: int) -> None:
        """Counts the images of one batch."""
        if self._bar:
            bar, task = self._bar
            bar.advance(task, images)

    def epoch(self, label: str, record: dict[str, Any], epochs: int) -> None:
        """Prints what an epoch brought."""
        width = len(str(epochs))
        phase = f"{record['phase']}  " if "phase" in record else ""
        self.say(
            f"{label}  epoch {record['epoch']:{width}d}/{epochs}  {phase}loss {record['train_loss']:.4f}  "
            f"test accuracy {record['val_accuracy']:7.2%}  {record['seconds']:.2f} s"
        )
