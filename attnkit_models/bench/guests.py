"""Backends that exist for comparison only: known inside a `with` block, never chosen automatically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnkit.registry import BACKENDS
from attnkit_models.bench.formulations.biformer_gather import NAME as BIFORMER_GATHER

NOTHING = "nothing"

GUESTS = {
    BIFORMER_GATHER: "attnkit_models.bench.formulations.biformer_gather:BiFormerGather",
    NOTHING: "attnkit_models.bench.layer_problems:Nothing",
}


@contextmanager
def guest_backend(name: str) -> Iterator[None]:
    """Puts one backend of `GUESTS` into attnkit's table of backends, and takes it out again."""
    new = name not in BACKENDS
    if new:
        BACKENDS[name] = GUESTS[name]
    try:
        yield
    finally:
        if new:
            del BACKENDS[name]
