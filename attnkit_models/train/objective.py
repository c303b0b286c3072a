"""What a training step makes smaller, and with which schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnkit_models.train.data import ImageData
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.row import Row


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with a learning rate of its own.

    Args:
        name: what it is called in the metrics.
        epochs: how many epochs it lasts, >= 1.
        lr: its peak learning rate.
        warmup: epochs of linear warm-up before the cosine, in [0, epochs).
    """

    name: str
    epochs: int
    lr: float
    warmup: float


class Objective(nn.Module, ABC):
    """A model in training: images and labels in, the loss out.

    This, and not the model alone, is what data parallelism wraps, so that gradients are averaged over the processes
    whatever the loss is made of.

    Args:
        model: the model that learns.
        phases: what the training consists of, in order.
    """

    def __init__(self, model: nn.Module, phases: tuple[Phase, ...]) -> None:
        super().__init__()
        self.model = model
        self.phases = phases

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor, phase: str) -> Tensor:
        """The loss of a batch, a tensor of shape (): a mean over the images unless the objective says otherwise.

        Args:
            images: normalised images (B, channels, H, W).
            labels: class indices (B,).
            phase: name of the current phase.
        """

    def phase_of(self, epoch: int) -> tuple[Phase, int]:
        """The phase of an epoch counted from 0, and the first epoch of that phase."""
        first = 0
        for phase in self.phases:
            if epoch < first + phase.epochs:
                return phase, first
            first += phase.epochs
        raise IndexError(f"epoch {epoch} is after the last phase")


class Classification(Objective):
    """Cross-entropy with the labels, in one phase.

    Args:
        model: the model that learns.
        options: how to train.
    """

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        super().__init__(model, (Phase("classification", options.epochs, options.lr, options.warmup_epochs),))
        self.label_smoothing = options.label_smoothing

    def forward(self, images: Tensor, labels: Tensor, phase: str) -> Tensor:
        return F.cross_entropy(self.model(images).float(), labels, label_smoothing=self.label_smoothing)


class Recipe(ABC):
    """How a model learns: the weights it starts with, and its objective."""

    @abstractmethod
    def prepared(self, data: ImageData) -> ImageData:
        """The data as the model is to see them.

        Raises:
            ConfigError: if the model cannot learn from these.
        """

    @abstractmethod
    def begin(self, model: nn.Module) -> None:
        """Gives a new model the weights it starts with."""

    @abstractmethod
    def objective(self, model: nn.Module, options: TrainOptions) -> Objective:
        """The model with its loss."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a continued run must agree in, as plain data."""

    @abstractmethod
    def origins(self, data: ImageData) -> list[Row]:
        """Rows for the table at the end: what the model comes from."""


class Supervised(Recipe):
    """From fresh weights and labels alone."""

    def prepared(self, data: ImageData) -> ImageData:
        return data

    def begin(self, model: nn.Module) -> None:
        pass

    def objective(self, model: nn.Module, options: TrainOptions) -> Objective:
        return Classification(model, options)

    def identity(self) -> dict[str, Any]:
        return {}

    def origins(self, data: ImageData) -> list[Row]:
        return []
