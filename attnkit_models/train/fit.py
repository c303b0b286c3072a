"""Trains one model from its first epoch, or its last finished one, to the end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from attnkit.errors import CheckpointError
from attnkit_models.train.checkpoint import explain, pack, unpack, versions, write_atomically, write_json
from attnkit_models.train.data import ImageData
from attnkit_models.train.distributed import on_main
from attnkit_models.train.loop import Setup, evaluate, seed_epoch, train_epoch
from attnkit_models.train.memory import PeakMemory
from attnkit_models.train.objective import Recipe
from attnkit_models.train.optimize import adamw
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.order import loaders
from attnkit_models.train.progress import Reporter
from attnkit_models.train.resume import Progress, check_identity, pack_state, read_progress, unpack_state
from attnkit_models.train.room import enough_memory
from attnkit_models.train.rundir import BEST, LAST, METRICS, RESUME
from attnkit_models.train.seeds import seed_of
from attnkit_models.train.task import Task


def fit(
    task: Task, data: ImageData, options: TrainOptions, accelerator: Accelerator, reporter: Reporter
) -> tuple[Progress, PeakMemory]:
    """Trains a model, saving after every epoch.

    Returns:
        The finished progress, and what its memory was measured with.

    Raises:
        CheckpointError: if a file cannot be written or the resume file is another model's.
        ConfigError: if training diverges.
    """
    torch.manual_seed(seed_of("weights", options.seed))
    memory = PeakMemory(accelerator.device)
    # Tokens lie channels last, and so do the gradients of convolutions over them. Weights that lie otherwise cost a
    # copy of each gradient, or where only axes of size 1 lie otherwise, a warning of data parallelism.
    model = task.build().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # Data parallelism waits for the gradients of all parameters unless told that some never get one.
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=task.idle_parameters)  # pyright: ignore
    task.recipe.begin(model)
    objective = task.recipe.objective(model, options)
    raw_optimizer = adamw(model, options)
    trained, optimizer = accelerator.prepare(objective, raw_optimizer)
    setup = Setup(
        accelerator, model, objective, trained, optimizer, *loaders(accelerator, data, options), data, options
    )
    progress = Progress(identity=identity_of(task.config, data, options, task.recipe))
    progress = _restore(task, setup, model, raw_optimizer, progress)
    if progress.epoch:
        reporter.say(f"{task.label}  resumed after epoch {progress.epoch}/{options.epochs}")
    images = min(len(setup.train_loader) * options.batch_size, len(data.train))
    with reporter.training(task.label, images=options.epochs * images, done=progress.epoch * images):
        for epoch in range(progress.epoch, options.epochs):
            start = time.perf_counter()
            seed_epoch(setup, epoch)
            with enough_memory(
                f"to train {task.label} with batch_size={options.batch_size}",
                "choose a smaller --batch-size, with a larger --grad-accum for the same steps",
            ):
                learned = train_epoch(setup, epoch, reporter.tick)
                seconds_training = time.perf_counter() - start
                tested = evaluate(setup)
            record = {
                "epoch": epoch + 1,
                **({"phase": objective.phase_of(epoch)[0].name} if len(objective.phases) > 1 else {}),
                **learned,
                **tested,
                "seconds": round(time.perf_counter() - start, 4),
                "images_per_second": round(images / seconds_training, 1),
                "peak_memory_mb": memory.megabytes(),
            }
            progress.history.append(record)
            progress.epoch = epoch + 1
            progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
            on_main(accelerator, lambda: _save(task, data, model, raw_optimizer, progress))
            reporter.epoch(task.label, record, options.epochs)
    accelerator.free_memory()
    return progress, memory


def identity_of(config: dict[str, Any], data: ImageData, options: TrainOptions, recipe: Recipe) -> dict[str, Any]:
    """What a run is: a continuation must agree in all of it."""
    return {
        "model": config,
        **({"recipe": recipe.identity()} if recipe.identity() else {}),
        "options": options.to_dict(full=True),
        "data": {"name": data.name, "classes": list(data.classes), "fingerprint": data.fingerprint},
    }


def _restore(task: Task, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer, fresh: Progress) -> Progress:
    """Goes on from the resume file if there is one; otherwise writes the first."""
    path = task.folder / RESUME

    def read() -> tuple[Progress, bytes] | None:
        if not path.is_file():
            write_atomically(path, pack_state(model, optimizer, fresh))
            write_atomically(task.folder / METRICS, b"")
            return None
        found = read_progress(path)
        check_identity(found.identity, fresh.identity, path)
        lines = "".join(json.dumps(record) + "\n" for record in found.history)
        write_atomically(task.folder / METRICS, lines.encode())
        return found, path.read_bytes()

    # The main process reads for all: on several machines only its disk need hold the run.
    found = on_main(setup.accelerator, read)
    if found is None:
        return fresh
    progress, content = found
    unpack_state(path, model, optimizer, unpack(content, source=str(path)))
    if setup.accelerator.scaler and progress.scaler:
        setup.accelerator.scaler.load_state_dict(progress.scaler)
    return progress


def _save(task: Task, data: ImageData, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Writes an epoch's files; the resume file is what counts, so the line in the metrics comes after it."""
    record = progress.history[-1]
    header = {
        "kind": "weights",
        "label": task.label,
        "model": task.config,
        "classes": list(data.classes),
        "preprocess": data.preprocess.to_dict(),
        "epoch": record["epoch"],
        "val_accuracy": record["val_accuracy"],
        "versions": versions(),
    }
    weights = pack(model.state_dict(), header)
    try:
        for name in (BEST, LAST) if record is progress.best else (LAST,):
            write_atomically(task.folder / name, weights)
            write_json((task.folder / name).with_suffix(".json"), header)
        write_atomically(task.folder / RESUME, pack_state(model, optimizer, progress))
        _append(task.folder / METRICS, json.dumps(record) + "\n")
    except CheckpointError as error:
        kept = (
            f"epoch {record['epoch'] - 1} is safe in {task.folder}" if record["epoch"] > 1 else "no epoch was finished"
        )
        raise CheckpointError(f"{error} ({kept})") from error


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {explain(error, len(line))}") from error
