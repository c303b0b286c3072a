"""How this program was called, to suggest commands that work as typed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def invocation() -> str:
    """The words that call `attnkit` in this shell: its path where the environment it lies in is not activated."""
    program = Path(sys.argv[0])
    if program.stem == "attnkit":
        return _shortest(program)
    if program.parts[-3:] == ("attnkit", "cli", "__main__.py"):
        return f"{_shortest(Path(sys.executable))} -m attnkit.cli"
    return "attnkit"


def _shortest(program: Path) -> str:
    """The name alone if the shell finds this very file by it, else the path from here or the whole one."""
    found = shutil.which(program.name)
    if found and os.path.abspath(found) == os.path.abspath(program):  # noqa: PTH100 (leaves links as they are)
        return program.name
    path = Path(os.path.abspath(program))  # noqa: PTH100
    here = Path.cwd()
    # A bare name would be looked up on PATH.
    below = path.is_relative_to(here) and path.parent != here
    return shlex.quote(str(path.relative_to(here) if below else path))
