"""The sweep: many cases in several processes, counted, with every finding and the line that repeats it."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fuzz.case import KINDS, Result, run_case
from tests.fuzz.limits import SECONDS
from tests.fuzz.record import BEGIN, write_record

CASES = 2_200
# A case that its own alarm cannot end, because it hangs outside Python, is ended from outside.
PATIENCE = 10 * SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one case, all seeds of a kind, or a whole sweep. Returns 1 if there was any finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind of case; all where not given")
    parser.add_argument("--seed", type=int, help="run this one case of the kind, here and now")
    parser.add_argument("--cases", type=int, default=CASES, help=f"how many cases in all ({CASES})")
    parser.add_argument("--start", type=int, default=0, help="the first seed of every kind (0)")
    parser.add_argument("--processes", type=int, default=2, help="how many processes (2)")
    parser.add_argument("--record", type=Path, help="write the counts into this page, between its two marks")
    given = parser.parse_args(arguments)
    if given.record and not (given.record.is_file() and BEGIN in given.record.read_text(encoding="utf-8")):
        parser.error(f"--record needs a page that holds {BEGIN}, but got {given.record}")
    if given.seed is not None:
        if given.kind is None:
            parser.error("--seed needs the kind of the case")
        return _show(run_case(given.kind, given.seed))
    plan = share_out(given.cases, [given.kind] if given.kind else list(KINDS))
    todo = [(kind, given.start + at) for kind, count in plan.items() for at in range(count)]
    begun = time.monotonic()
    results = list(sweep(todo, given.processes, _progress(len(todo))))
    took = time.monotonic() - begun
    findings = [result for result in results if result.outcome == "finding"]
    for result in findings:
        print(f"\n{result.command}\n{result.detail}")
    text = write_record(results, start=given.start, seconds=took, page=given.record)
    print(f"\n{text}")
    return 1 if findings else 0


def share_out(cases: int, kinds: Sequence[str]) -> dict[str, int]:
    """How many cases each kind gets."""
    total = sum(KINDS[kind] for kind in kinds)
    counts = {kind: cases * KINDS[kind] // total for kind in kinds}
    for kind in list(counts)[: cases - sum(counts.values())]:
        counts[kind] += 1
    return counts


def sweep(
    todo: Sequence[tuple[str, int]], processes: int, progress: Callable[[Result], None] = lambda _: None
) -> Iterator[Result]:
    """Runs cases in processes of their own; one that dies or hangs is a finding, and another takes its place."""
    # Neighbours of one kind cost alike, so that dealing them out in turn keeps all processes busy to the end.
    waiting = deque(sorted(todo, key=lambda one: one[1]))
    workers = [Worker() for _ in range(max(1, min(processes, len(waiting))))]
    try:
        while waiting or any(worker.case for worker in workers):
            for worker in workers:
                if waiting and worker.case is None:
                    worker.start(waiting.popleft())
            ready = wait([worker.pipe for worker in workers if worker.case], timeout=1.0)
            for at, worker in enumerate(workers):
                result = worker.result(ready=worker.pipe in ready)
                if result is not None:
                    progress(result)
                    yield result
                if worker.dead:
                    worker.stop()
                    workers[at] = Worker()
    finally:
        for worker in workers:
            worker.stop()


class Worker:
    """A process that runs one case after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.case: tuple[str, int] | None = None
        self.begun = 0.0
        self.dead = False

    def start(self, case: tuple[str, int]) -> None:
        self.case, self.begun = case, time.monotonic()
        self.pipe.send(case)

    def result(self, *, ready: bool) -> Result | None:
        """What became of the case, if that is known by now."""
        if self.case is None:
            return None
        found = None
        if ready:
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join()
                self.dead = True
                found = Result(*self.case, "finding", f"the process died with status {self.process.exitcode}")
        elif time.monotonic() - self.begun > PATIENCE:
            self.dead = True
            found = Result(*self.case, "finding", f"hung for {PATIENCE} s, and no alarm could end it")
        if found is not None:
            self.case = None
        return found

    def stop(self) -> None:
        self.pipe.close()
        if self.dead:
            self.process.kill()
        self.process.join()


def _work(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    # What cases print themselves would tear the counter apart.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(run_case(*case))


def _show(result: Result) -> int:
    print(f"{result.command}: {result.outcome}")
    if result.detail:
        print(result.detail)
    return 1 if result.outcome == "finding" else 0


def _progress(total: int) -> Callable[[Result], None]:
    done = findings = 0

    def count(result: Result) -> None:
        nonlocal done, findings
        done += 1
        findings += result.outcome == "finding"
        if done % 100 == 0 or done == total:
            print(f"{done} of {total} cases, {findings} findings", flush=True)

    return count
