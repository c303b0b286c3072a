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
from attnkit_models.train.room import enough_memory
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


def rehearse(
    label: str, build: Callable[[], nn.Module], data: ImageData, options: TrainOptions, folder: Path, *, images: int = 2
) -> Task:
    """Builds a model, counts its cost and takes one step with a few blank images.

    That proves that the model takes these images and learns. It also makes PyTorch load whatever the first
    step loads, which would otherwise count as the first model's memory.

    Args:
        label: the model's name.
        build: makes the model.
        data: what it is to be trained on.
        options: how to train.
        folder: where its files go.
        images: how many blank images, >= 1.

    Raises:
        ConfigError: if the model's output is no logits for the data's classes, or if memory runs out.
        ShapeError: if the model cannot train on so few images of that size.
    """
    height, width = data.preprocess.img_size
    pixels = f"{images} image{'s' * (images > 1)} of {height} x {width} pixels"
    torch.manual_seed(seed_of("weights", options.seed))
    with enough_memory(f"to train {label} on {pixels}", "choose a smaller --img-size or another model"):
        model = build()
        macs = int(attnkit.flops(model, data.preprocess.img_size).total)
        logits = model.train()(torch.zeros(images, data.preprocess.channels, height, width))
        if tuple(logits.shape) != (images, len(data.classes)):
            raise ConfigError(
                f"{label} turns {pixels} into {tuple(logits.shape)}, but training needs logits "
                f"({images}, {len(data.classes)})"
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
