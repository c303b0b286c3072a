"""Runs in a process of its own: trains once in peace, then kills and resumes a copy at many moments.

Usage: interrupted.py DATA OUT. Each killed training is a fork, so that nothing but SIGKILL ends it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from attnkit_models.train import checkpoint, fit, loop
from attnkit_models.train import run as job
from attnkit_models.train.checkpoint import read_weights
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.progress import Reporter
from attnkit_models.train.run import Choice, train

TINY = {"kind": "bigbird_vit_micro", "drop_path": 0.2}
OPTIONS = TrainOptions(epochs=3, warmup=1, batch_size=6, img_size=16, lr=1e-3)


def run(out: Path, *, resume: bool) -> None:
    train([Choice("tiny", TINY)], out=out, data=DATA, options=OPTIONS, resume=resume, reporter=Reporter(main=False))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_batch(number: int) -> Callable[[], None]:
    """Dies in the middle of a batch, after the backward pass."""

    def arm() -> None:
        seen, step = [0], loop.learning_rate

        def counting(*args, **kwargs):
            seen[0] += 1
            if seen[0] == number:
                die()
            return step(*args, **kwargs)

        loop.learning_rate = counting

    return arm


def in_write(name: str, number: int, moment: str) -> Callable[[], None]:
    """Dies before, inside or after the atomic write of a file, the `number`-th time it is written."""

    def arm() -> None:
        seen, write = [0], checkpoint.write_atomically

        def dying(path, content):
            seen[0] += path.name == name
            if path.name == name and seen[0] == number:
                if moment == "inside":
                    path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
                elif moment == "after":
                    write(path, content)
                die()
            write(path, content)

        checkpoint.write_atomically = fit.write_atomically = dying

    return arm


def in_metrics() -> None:
    """Dies with half a line in the metrics."""

    def dying(path, line):
        with path.open("a") as file:
            file.write(line[: len(line) // 2])
            file.flush()
            die()

    fit._append = dying


def at_random(seconds: float) -> Callable[[], None]:
    """Dies by a timer that no Python code sees coming."""

    def arm() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return arm


def kill(out: Path, arm: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            arm()
            run(out, resume=False)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def weights(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("last.safetensors", "best.safetensors")}


def losses(out: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["epoch"], record["train_loss"], record["val_accuracy"]) for record in records]


def main() -> None:
    # Pictures take most of the time here and come after everything that is looked at.
    job._finish = lambda *args: None
    began = time.perf_counter()
    run(ROOT / "whole", resume=False)
    duration = time.perf_counter() - began
    moments = {
        "first batch": in_batch(1),
        "second epoch": in_batch(6),
        "inside best": in_write("best.safetensors", 1, "inside"),
        "after best": in_write("best.safetensors", 1, "after"),
        "inside last": in_write("last.safetensors", 2, "inside"),
        "before resume": in_write("resume.safetensors", 3, "before"),
        "inside resume": in_write("resume.safetensors", 3, "inside"),
        "after resume": in_write("resume.safetensors", 3, "after"),
        "at the end": in_write("resume.safetensors", 4, "after"),
        "metrics": in_metrics,
    }
    for number in range(3):
        moments[f"random {number}"] = at_random(random.Random(number).uniform(0.1, 0.9) * duration)
    for name, arm in moments.items():
        out = ROOT / name.replace(" ", "_")
        kill(out, arm)
        for file in out.rglob("*.safetensors"):
            assert read_weights(file), f"{name}: {file} is half-written"
        for file in out.rglob("*.json"):
            json.loads(file.read_text())
        run(out, resume=True)
        assert weights(out) == weights(ROOT / "whole"), f"killed {name}: other weights"
        assert losses(out) == losses(ROOT / "whole"), f"killed {name}: other metrics"
        assert not list(out.rglob("*.partial")), f"killed {name}: leftovers"
        print("same after", name)


if __name__ == "__main__":
    DATA, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
    main()
