"""Sparsifiner's training (Wei et al. 2023, arXiv 2303.13755): first its mask predictors learn to reconstruct a dense
teacher's attention, then the backbone learns to see only what they choose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.errors import ConfigError
from attnkit.kernels.precision import widened, without_autocast
from attnkit.primitives import SoftmaxHeads
from attnkit.primitives.guesses import GuessHeads
from attnkit_models.backbones import IsotropicModel
from attnkit_models.distillation import attention_reconstruction, distillation, distilled, watching
from attnkit_models.train.data import ImageData
from attnkit_models.train.objective import Objective, Recipe
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.row import Row
from attnkit_models.train.sparsifying_options import RECONSTRUCTION, SparsifyingOptions
from attnkit_models.train.teacher import Teacher


class Sparsifying(Recipe):
    """A sparse model learns from a dense one in its shape.

    Args:
        options: losses and lengths.
        teacher: the dense model.
    """

    def __init__(self, options: SparsifyingOptions, teacher: Teacher) -> None:
        self.options = options
        self.teacher = teacher

    def prepared(self, data: ImageData) -> ImageData:
        return self.teacher.prepared(data)

    def begin(self, model: nn.Module) -> None:
        """Gives a model the teacher's weights.

        Raises:
            ConfigError: if it has no mask predictors, or differs from the teacher in more than what its heads see.
        """
        predictors = [f"{path}.predictor" for path, one in model.named_modules() if isinstance(one, GuessHeads)]
        if not predictors:
            raise ConfigError(
                "the model has no mask predictors that --recipe sparsifiner could train; leave --model out to give "
                f"them to all dense heads of its teacher {self.teacher.label}, or name a model that has some"
            )
        self.teacher.hand_over(model, new=tuple(predictors))
        ours, theirs = (
            [one.options.heads for one in each.modules() if isinstance(one, SoftmaxHeads)]
            for each in (model, self.teacher.model)
        )
        if ours != theirs:
            raise ConfigError(
                f"the model's head groups, of {_listed(ours)} heads, are not those of its teacher "
                f"{self.teacher.label}, of {_listed(theirs)}: every group learns from the one in its place"
            )

    def objective(self, model: nn.Module, options: TrainOptions) -> Objective:
        assert isinstance(model, IsotropicModel)
        return SparsifyingObjective(model, self.teacher.model, self.options, options)

    def identity(self) -> dict[str, Any]:
        return {**self.options.to_dict(full=True), "teacher": self.teacher.fingerprint()}

    def origins(self, data: ImageData) -> list[Row]:
        return [self.teacher.row(data)]


class SparsifyingObjective(Objective):
    """Reconstruction of the teacher's attention maps, then distillation.

    Args:
        model: the sparse model, with the teacher's weights.
        teacher: the dense model, in eval mode and without gradients.
        options: losses and lengths.
        training: how to train.
    """

    model: IsotropicModel

    def __init__(
        self, model: IsotropicModel, teacher: IsotropicModel, options: SparsifyingOptions, training: TrainOptions
    ) -> None:
        super().__init__(model, options.phases(training))
        self.teacher = teacher
        self.options = options
        self.label_smoothing = training.label_smoothing

    def train(self, mode: bool = True) -> SparsifyingObjective:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, phase: str) -> Tensor:
        """The loss of a batch: of the reconstruction, as the authors have it, a sum over the images and no mean."""
        return self._reconstruction(images) if phase == RECONSTRUCTION else self._distillation(images, labels)

    def _reconstruction(self, images: Tensor) -> Tensor:
        """One pass of the teacher: the model's own would be the same, for only its predictors have changed."""
        with torch.no_grad(), watching(self.teacher) as seen:
            self.teacher(images)
            maps = seen.maps()
        heads = [one for one in self.model.modules() if isinstance(one, SoftmaxHeads)]
        pairs: list[tuple[Tensor, Tensor]] = []
        for group, (_, inputs, _), whole in zip(heads, seen.visits, maps, strict=True):
            if isinstance(group, GuessHeads):
                q, k, _ = inputs.qkv
                with without_autocast(q.device):
                    pairs.append((group.predictor.guess(widened(q), widened(k), inputs), whole))
        guesses, wanted = zip(*pairs, strict=True)
        return attention_reconstruction(guesses, wanted, weight=self.options.reconstruction)

    def _distillation(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits, teacher_tokens, _ = distilled(self.teacher, images)
        logits, tokens, left = distilled(self.model, images)
        classes = logits.shape[1]
        soft = F.one_hot(labels, classes) * (1 - self.label_smoothing) + self.label_smoothing / classes
        terms = distillation(
            logits.float(), teacher_logits.float(), tokens.float(), teacher_tokens.float(), soft, left=left,
            weights={"labels": self.options.labels, "logits": self.options.logits, "tokens": self.options.tokens},
        )  # fmt: skip
        return torch.stack(list(terms.values())).sum()


def _listed(numbers: list[int]) -> str:
    shown = [*map(str, numbers[:6]), *(["..."] if len(numbers) > 6 else [])]
    return ", ".join(shown) or "no"
