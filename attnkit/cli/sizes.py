"""Sizes as text: `224`, or `96x160` for height x width."""

from __future__ import annotations

import math
import re

from attnkit.errors import ConfigError


def read_size(text: str, option: str) -> tuple[int, int]:
    """Reads a height and a width from `"224"` or `"96x160"`.

    Args:
        text: what the user wrote.
        option: where, for messages: `"--size"`.

    Raises:
        ConfigError: if the text is neither form, or a size is less than 1.
    """
    sizes = [int(part) for part in text.split("x")] if re.fullmatch(r"-?\d+(x-?\d+)?", text) else [0]
    if min(sizes) < 1 or math.prod(sizes) > 2**30:
        raise ConfigError(f"{option} {text} must be at least 1, such as 224, or height x width such as 96x160")
    return sizes[0], sizes[-1]
