"""Paths as a user may type them: a name too long for the system is no file, not an error of its own."""

from __future__ import annotations

import os.path
from pathlib import Path


def is_file(path: Path) -> bool:
    """Whether a file stands there; `Path.is_file` raises for names that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a folder stands there; `Path.is_dir` raises for names that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112
