"""Limits of time and memory around one case, so that what asks for too much is a finding and no crash."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS = 20
MEGABYTES = 1024


class OutOfTime(BaseException):
    """A case that takes too long; no `Exception`, so that code which catches those lets it through."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Ends what is inside after some seconds of processor time, and bounds what it may allocate beyond what is held."""
    with _limited_memory(megabytes), _limited_time(seconds):
        yield


@contextlib.contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    # Signals only reach the main thread, and exist on POSIX only.
    if not hasattr(signal, "SIGPROF") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"took more than {seconds:g} s of processor time")

    # The process's own time, so that a busy machine makes no findings.
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited_memory(megabytes: int) -> Iterator[None]:
    held = _held()
    # Elsewhere the limit does not count what allocators map.
    if held is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _held() -> int | None:
    """Bytes of private writable memory of this process, which is what `RLIMIT_DATA` counts."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData:")]
    return int(found[0]) * 1024 if found else None
