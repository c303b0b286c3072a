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
from attnkit.primitives import HeadGroup
from attnkit_models.train.checkpoint import load_weights, read_weights
from attnkit_models.train.data import ImageData
from attnkit_models.train.objective import Recipe, Supervised
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
        recipe: how it learns.
        folder: where its files go.
        parameters: number of parameters.
        macs: multiply-accumulates for one image.
        attention_macs: those of the head groups: attention, and what chooses its keys.
        idle_parameters: whether some parameters never get a gradient.
    """

    label: str
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    recipe: Recipe
    folder: Path
    parameters: int
    macs: int
    attention_macs: int
    idle_parameters: bool


def rehearse(
    label: str,
    build: Callable[[], nn.Module],
    data: ImageData,
    options: TrainOptions,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    images: int = 2,
) -> Task:
    """Builds a model, counts its cost and takes one step of every phase with a few blank images.

    That proves that the model takes these images and learns. It also makes PyTorch load whatever the first
    step loads, which would otherwise count as the first model's memory.

    Args:
        label: the model's name.
        build: makes the model.
        data: what it is to be trained on.
        options: how to train.
        folder: where its files go.
        recipe: how it learns; from labels alone if None.
        images: how many blank images, >= 1.

    Raises:
        ConfigError: if the model's output is no logits for the data's classes, or if memory runs out.
        ShapeError: if the model cannot train on so few images of that size.
    """
    height, width = data.preprocess.img_size
    pixels = f"{images} image{'s' * (images > 1)} of {height} x {width} pixels"
    torch.manual_seed(seed_of("weights", options.seed))
    recipe = recipe or Supervised()
    with enough_memory(f"to train {label} on {pixels}", "choose a smaller --img-size or another model"):
        model = build()
        cost = cost_of(model, (height, width))
        blank = torch.zeros(images, data.preprocess.channels, height, width)
        with torch.no_grad():
            logits = model.train()(blank)
        if tuple(logits.shape) != (images, len(data.classes)):
            raise ConfigError(
                f"{label} turns {pixels} into {tuple(logits.shape)}, but training needs logits "
                f"({images}, {len(data.classes)})"
            )
        recipe.begin(model)
        objective = recipe.objective(model, options).train()
        optimizer = adamw(model, options)
        for phase in objective.phases:
            objective(blank, torch.zeros(images, dtype=torch.int64), phase.name).backward()
            optimizer.step()
            optimizer.zero_grad()
    parameters = list(model.parameters())
    # Phases need not train the same parameters.
    idle = len(objective.phases) > 1 or any(one.requires_grad and one not in optimizer.state for one in parameters)
    count = sum(one.numel() for one in parameters)
    config = model.config.to_dict(full=True)  # pyright: ignore
    return Task(label, build, config, recipe, folder, count, *cost, idle)


def cost_of(model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
    """Multiply-accumulates for one image: of the whole model, and of its head groups."""
    count = attnkit.flops(model, img_size)
    groups = {path for path, one in model.named_modules() if isinstance(one, HeadGroup)}
    return int(count.total), int(sum(row.total for row in count.rows if row.path in groups))


def load_best(task: Task) -> nn.Module:
    """The model with the weights of its best epoch, on the CPU."""
    model = task.build()
    load_weights(model, read_weights(task.folder / BEST), source=str(task.folder / BEST))
    return model.eval()
