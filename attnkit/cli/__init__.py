"""The command `attnkit`: every mistake of the user is one line on standard error and exit status 2."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from attnkit.errors import AttnkitError, load_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows `attnkit`; the process's own if None.

    Returns:
        Exit status: 0, 1 where some of several files could not be read, 2 for the user's mistakes, 130 when
        interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # OpenMP's threads spin while they wait for each other, which on a machine with other work makes training many
    # times slower. It reads this once, when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        load_extra("typer", extra="train", purpose="the command line")
        from attnkit.cli.commands import app

        status = app(args=given or ["--help"], prog_name="attnkit", standalone_mode=False)
    except AttnkitError as error:
        return _fail(*getattr(error, "mistakes", (str(error),)))
    except Exception as error:
        # typer brings its own click in some versions and imports it in others, so its errors have no one class.
        if type(error).__name__ == "Abort":
            return 130
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return _fail(f"there is not enough memory for this; choose a smaller size; you gave: {_typed(given)}")
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        return _fail(f"{message}; you gave: {_typed(given)}")
    return status if isinstance(status, int) else 0


def _typed(given: Sequence[str]) -> str:
    return shlex.join(["attnkit", *given])


def _fail(*messages: str) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    for message in messages:
        print(f"error{where}: {' '.join(message.split())}", file=sys.stderr)
    return 2
