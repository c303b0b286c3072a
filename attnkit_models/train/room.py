"""Whether images and models fit into memory: a sentence in place of a traceback, or of a killed process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnkit.errors import ConfigError

# Threads that decode images; each holds one at a time.
DECODERS = 8


def installed_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_size(size: tuple[int, int], channels: int, *, batch: int, kept: int = 0) -> None:
    """Makes sure that images of a size can be held at all.

    Args:
        size: height and width in pixels.
        channels: channels an image.
        batch: images in one forward pass, held as floating-point numbers.
        kept: images held in eight bits from the beginning, twice while they are split.

    Raises:
        ConfigError: if they need more memory than there is in the machine.
    """
    numbers = size[0] * size[1] * channels
    needed = numbers * (4 * max(batch, DECODERS) + 2 * kept)
    there = installed_memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"img_size={size[0]} x {size[1]}: images of that size need at least {needed / 1e9:,.0f} GB of memory with "
            f"batch_size={batch}, and this machine has {there / 1e9:,.0f} GB; choose a smaller img_size"
        )


@contextmanager
def enough_memory(attempt: str, advice: str) -> Iterator[None]:
    """Says in a sentence that memory ran out.

    Args:
        attempt: what it ran out for.
        advice: what to do about it.

    Raises:
        ConfigError: in place of the error of the allocator, Python's, PyTorch's or the device's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise ConfigError(f"there is not enough memory {attempt}; {advice}") from error
