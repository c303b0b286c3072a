"""One model's training, and a rehearsal of it before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnkit
from attnkit.errors import ConfigError
from attnkit_models.train.checkpoint import load_weights, read_weights
from attnkit_models.train.data import ImageData
from attnkit_models.train.optimize import adamw
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.rundir import BEST
from attnkit_models.train.seeds import seed_of


@dataclass(frozen=True)
class Task:
    """One model's training.

    Args:
        label: the model's name.
        build: makes the model.
        config: the model's configuration as plain data, from which `attnkit.build` makes it again.
        folder: where its files go.
        parameters: number of parameters.
        macs: multiply-accumulates for one image.
        idle_parameters: whether some parameters never get a gradient.
    """

    label: str
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    folder: Path
    parameters: int
    macs: int
    idle_parameters: bool


def rehearse(label: str, build: Callable[[], nn.Module], data: ImageData, options: TrainOptions, folder: Path) -> Task:
    """Builds a model, counts its cost and takes one step with two blank images.

    That proves that the model takes these images and learns. It also makes PyTorch load whatever the first
    step loads, which would otherwise count as the first model's memory.

    Raises:
        ConfigError: if the model's output is no logits for the data's classes.
    """
    torch.manual_seed(seed_of("weights", options.seed))
    model = build()
    shape = (data.preprocess.channels, *data.preprocess.img_size)
    macs = int(attnkit.flops(model, data.preprocess.img_size).total)
    logits = model.train()(torch.zeros(2, *shape))
    if tuple(logits.shape) != (2, len(data.classes)):
        raise ConfigError(
            f"{label} turns 2 images into {tuple(logits.shape)}, but training needs logits (2, {len(data.classes)})"
        )
    optimizer = adamw(model, options)
    logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    parameters = list(model.parameters())
    idle = any(one.requires_grad and one not in optimizer.state for one in parameters)
    count = sum(one.numel() for one in parameters)
    return Task(label, build, model.config.to_dict(full=True), folder, count, macs, idle)  # pyright: ignore


def load_best(task: Task) -> nn.Module:
    """The model with the weights of its best epoch, on the CPU."""
    model = task.build()
    load_weights(model, read_weights(task.folder / BEST), source=str(task.folder / BEST))
    return model.eval()
