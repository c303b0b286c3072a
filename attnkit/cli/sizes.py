"""Sizes as text: `224`, or `96x160` for height x width."""

from __future__ import annotations

import re

from attnkit.errors import ConfigError

# Pixels or tokens a side that are ever asked for.
LARGEST = 2**14


def read_size(text: str, option: str) -> tuple[int, int]:
    """Reads a height and a width from `"224"` or `"96x160"`.

    Args:
        text: what the user wrote.
        option: where, for messages: `"--size"`.

    Raises:
        ConfigError: if the text is neither form, or a size is less than 1 or too large for any machine.
    """
    if not re.fullmatch(r"-?\d{1,18}(x-?\d{1,18})?", text):
        raise ConfigError(f"{option} {text!r} is no size; write 224, or height x width such as 96x160")
    sizes = [int(part) for part in text.split("x")]
    if min(sizes) < 1:
        raise ConfigError(f"{option} {text} must be at least 1 a side, such as 224, or 96x160 (height x width)")
    if max(sizes) > LARGEST:
        raise ConfigError(f"{option} {text} is too large; it must be at most {LARGEST} a side")
    return sizes[0], sizes[-1]
