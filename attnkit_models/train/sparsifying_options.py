"""Options of Sparsifiner's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnkit.errors import ConfigError
from attnkit.options import Options
from attnkit_models import distillation
from attnkit_models.train.objective import Phase
from attnkit_models.train.options import TrainOptions

RECONSTRUCTION, DISTILLATION = "reconstruction", "distillation"


@dataclass(frozen=True, kw_only=True)
class SparsifyingOptions(Options):
    """Options of `attnkit train --recipe sparsifiner`; the weights of the losses are the authors'.

    Args:
        reconstruction_epochs: epochs of the first phase, in [1, epochs); None takes a tenth of the epochs, at least 1.
        reconstruction_lr: peak learning rate of the first phase, > 0; None takes 3.75 times that of the second, which
            is the `lr` of training, as the authors do.
        reconstruction: weight of the squared error of the reconstructed attention, > 0.
        labels: weight of the cross-entropy with the labels, >= 0.
        logits: weight of the Kullback-Leibler divergence from the teacher's classes, >= 0.
        tokens: weight of the squared error from the teacher's last tokens, >= 0.
    """

    kind: ClassVar[str] = "sparsifiner"

    reconstruction_epochs: int | None = None
    reconstruction_lr: float | None = None
    reconstruction: float = distillation.RECONSTRUCTION
    labels: float = distillation.LABELS
    logits: float = distillation.LOGITS
    tokens: float = distillation.TOKENS

    def problems(self) -> list[str]:
        found = []
        if self.reconstruction_epochs is not None and self.reconstruction_epochs < 1:
            found.append(f"reconstruction_epochs={self.reconstruction_epochs}: must be >= 1")
        for name, value in (("reconstruction_lr", self.reconstruction_lr), ("reconstruction", self.reconstruction)):
            if value is not None and not 0 < value < float("inf"):
                found.append(f"{name}={value}: must be > 0, such as 0.01")
        weights = {"labels": self.labels, "logits": self.logits, "tokens": self.tokens}
        found += [f"{name}={value}: must be >= 0" for name, value in weights.items() if not 0 <= value < float("inf")]
        if not any(weights.values()):
            found.append("labels=0, logits=0, tokens=0: at least one must be > 0, or nothing trains the backbone")
        return found

    def phases(self, training: TrainOptions) -> tuple[Phase, Phase]:
        """Both phases of a training.

        Raises:
            ConfigError: if there are not enough epochs for two.
        """
        first = self.reconstruction_epochs or max(round(training.epochs / 10), 1)
        if first >= training.epochs:
            raise ConfigError(
                f"reconstruction_epochs={first} leaves none of epochs={training.epochs} to train the backbone; train "
                f"for more epochs"
            )
        lengths = (first, training.epochs - first)
        rates = (self.reconstruction_lr or 3.75 * training.lr, training.lr)
        # Each phase starts slowly; what was given is cut where a phase is too short for it.
        warm = [
            min(2.0, epochs / 10) if training.warmup is None else min(training.warmup, epochs / 2) for epochs in lengths
        ]
        names = (RECONSTRUCTION, DISTILLATION)
        one, two = (Phase(*each) for each in zip(names, lengths, rates, warm, strict=True))
        return one, two
