"""One pass over the training images, and one over the held-out ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from attnkit.errors import ConfigError
from attnkit_models.train.data import ImageData
from attnkit_models.train.objective import Objective
from attnkit_models.train.optimize import learning_rate
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.seeds import seed_of


@dataclass(frozen=True)
class Setup:
    """What stays the same over all epochs.

    Args:
        accelerator: runs it all.
        model: what is tested.
        objective: model and loss, as they were built.
        trained: the objective as the accelerator prepared it, like the optimizer and the loaders.
        optimizer: see `trained`.
        train_loader: see `trained`.
        val_loader: see `trained`.
        data: images and labels.
        options: how to train.
    """

    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    trained: nn.Module
    optimizer: Any
    train_loader: Any
    val_loader: Any
    data: ImageData
    options: TrainOptions

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self.train_loader) / self.options.grad_accum)


def seed_epoch(setup: Setup, epoch: int) -> None:
    """Makes what the model itself draws (stochastic depth, dropout) a function of seed, epoch and process."""
    torch.manual_seed(seed_of("epoch", setup.options.seed, epoch, setup.accelerator.process_index))


def train_epoch(setup: Setup, epoch: int, tick: Callable[[int], None]) -> dict[str, float]:
    """Trains for one epoch.

    Args:
        setup: the run.
        epoch: counted from 0.
        tick: called with the number of images (over all processes) after every batch.

    Returns:
        `train_loss`, the mean over the epoch's images, and `lr`, the last learning rate.

    Raises:
        ConfigError: if the loss stops being a number.
    """
    accelerator, options, data = setup.accelerator, setup.options, setup.data
    steps = setup.steps_an_epoch
    phase, first = setup.objective.phase_of(epoch)
    warmup = round(phase.warmup * steps)
    step, lr = (epoch - first) * steps, 0.0
    total = torch.zeros(
        2, dtype=torch.float64, device="cpu" if accelerator.device.type == "mps" else accelerator.device
    )
    setup.trained.train()
    setup.train_loader.set_epoch(epoch)
    for batch in setup.train_loader:
        images = batch["pixels"].float() / 255
        if options.augment:
            images = data.augmentation(images, batch["index"], count=len(data.train), seed=options.seed, epoch=epoch)
        lr = learning_rate(step, steps=phase.epochs * steps, warmup=warmup, peak=phase.lr)
        for group in setup.optimizer.param_groups:
            group["lr"] = lr
        with accelerator.accumulate(setup.trained):
            loss = setup.trained(data.preprocess.normalise(images), batch["label"], phase.name)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if options.clip_grad:
                    accelerator.clip_grad_norm_(setup.trained.parameters(), options.clip_grad)
                step += 1
            setup.optimizer.step()
            setup.optimizer.zero_grad()
        count = len(images)
        total += torch.stack([loss.detach().to(total) * count, torch.tensor(count).to(total)])
        tick(count * accelerator.num_processes)
    loss_sum, images_seen = _summed(accelerator, total)
    train_loss = loss_sum / images_seen
    if not math.isfinite(train_loss):
        raise ConfigError(
            f"the training loss became {train_loss} in epoch {epoch + 1}; train with a smaller learning rate "
            f"than lr={options.lr} or a longer warm-up than {phase.warmup:g} epochs"
        )
    return {"train_loss": train_loss, "lr": lr}


@torch.no_grad()
def evaluate(setup: Setup) -> dict[str, float]:
    """Accuracy and mean cross-entropy over the held-out images, each counted once in however many processes.

    Returns:
        `val_accuracy` in [0, 1] and `val_loss`.
    """
    setup.model.eval()
    if setup.accelerator.num_processes > 1:
        # Batch norms saw other images in every process; the main process's are those that are saved.
        for buffer in setup.model.buffers():
            buffer.copy_(broadcast(buffer))  # pyright: ignore[reportArgumentType]
    right, loss, count = 0, 0.0, 0
    for batch in setup.val_loader:
        with setup.accelerator.autocast():
            logits = setup.model(setup.data.preprocess.normalise(batch["pixels"].float() / 255))
        losses = F.cross_entropy(logits.float(), batch["label"], reduction="none")
        hits = logits.argmax(dim=1) == batch["label"]
        # Drops the images that only pad the last batch to equal shares.
        hits, losses = setup.accelerator.gather_for_metrics((hits, losses))
        right += int(hits.sum())
        loss += float(losses.sum())
        count += len(hits)
    return {"val_accuracy": right / count, "val_loss": loss / count}


def _summed(accelerator: Accelerator, total: Tensor) -> tuple[float, float]:
    summed: Any = accelerator.reduce(total, reduction="sum")
    return float(summed[0]), float(summed[1])
