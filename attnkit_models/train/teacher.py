"""A dense model that was trained before, and a sparse one in its shape that starts with its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnkit.errors import ConfigError
from attnkit.primitives import Dense, MaskPredictor
from attnkit_models.backbones import IsotropicConfig, IsotropicModel
from attnkit_models.sparsifiner import KEEP
from attnkit_models.train.data import ImageData
from attnkit_models.train.images import Preprocess
from attnkit_models.train.predict import load_classifier
from attnkit_models.train.row import Row
from attnkit_models.train.task import cost_of

BATCH = 256


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained dense model, frozen.

    Args:
        path: where it was read from.
        label: what its run called it.
        model: in eval mode, without gradients.
        config: its options.
        classes: class names, in the order of its logits.
        preprocess: how image files become its inputs.
    """

    path: Path
    label: str
    model: IsotropicModel
    config: IsotropicConfig
    classes: tuple[str, ...]
    preprocess: Preprocess

    def fingerprint(self) -> str:
        """Changes whenever a weight does."""
        content = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return content.hexdigest()[:16]

    def sparse_config(self, keep: float = KEEP) -> dict[str, Any]:
        """The teacher's options with a mask predictor for every dense group, as plain data."""
        plain = self.config.to_dict(full=True)
        grid = self.config.grid
        mixes = plain["mix"] if isinstance(plain["mix"], list) else [plain["mix"]]
        for group in (group for mix in mixes for group in mix["groups"]):
            if group["kind"] == Dense.kind:
                group |= {"kind": MaskPredictor.kind, "tokens": list(grid.sizes), "keep": keep, "prefix": grid.prefix}
        # The data say how many classes and channels there are.
        del plain["num_classes"], plain["in_chans"]
        return plain

    def hand_over(self, student: nn.Module, *, new: tuple[str, ...]) -> None:
        """Copies all weights into a model that differs from the teacher only by new parameters.

        Args:
            student: the model.
            new: names of the submodules that the teacher does not have.

        Raises:
            ConfigError: if it differs in more.
        """
        weights, own = self.model.state_dict(), student.state_dict()
        missing = [name for name in own if name not in weights and not name.startswith(tuple(f"{one}." for one in new))]
        wrong = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
        if missing or wrong:
            named = ", ".join([*missing, *wrong][:3])
            raise ConfigError(
                f"the model differs from its teacher {self.label} in more than its attention ({named}); leave --model "
                "out to train a sparse model in the teacher's shape"
            )
        student.load_state_dict({**own, **weights})

    def prepared(self, data: ImageData) -> ImageData:
        """The data, normalised as for the teacher.

        Raises:
            ConfigError: if classes, channels or image sizes differ.
        """
        if data.classes != self.classes:
            raise ConfigError(
                f"the teacher {self.path} tells {len(self.classes)} classes apart ({_few(self.classes)}), but "
                f"{data.name} has {len(data.classes)} ({_few(data.classes)}); train a teacher on {data.name} first"
            )
        mine, theirs = self.preprocess, data.preprocess
        if (mine.img_size, mine.channels) != (theirs.img_size, theirs.channels):
            raise ConfigError(
                f"the teacher {self.path} takes {_images(mine)}, but these are {_images(theirs)}; train with "
                f"--img-size {mine.img_size[0]}x{mine.img_size[1]}"
            )
        return replace(data, preprocess=mine)

    def row(self, data: ImageData) -> Row:
        """The teacher's line in the table."""
        accuracy, cost = self.accuracy(data), cost_of(self.model, data.preprocess.img_size)
        return Row(
            model=f"{self.label} (teacher)",
            val_accuracy=accuracy,
            best_val_accuracy=accuracy,
            parameters=sum(one.numel() for one in self.model.parameters()),
            macs=cost[0],
            attention_macs=cost[1],
        )

    @torch.no_grad()
    def accuracy(self, data: ImageData) -> float:
        """Share of the held-out images that the teacher classifies right, on the CPU."""
        # Called after training, on whatever device that left the teacher.
        model, right = self.model.cpu(), 0
        for first in range(0, len(data.val), BATCH):
            batch = data.val.__getitems__(range(first, min(first + BATCH, len(data.val))))
            logits = model(self.preprocess.normalise(batch["pixels"].float() / 255))
            right += int((logits.argmax(1) == batch["label"]).sum())
        return right / len(data.val)


def load_teacher(path: Path) -> Teacher:
    """Reads a trained dense model.

    Args:
        path: a checkpoint, or the folder of a run.

    Raises:
        CheckpointError: if there is none, or it cannot be used.
        ConfigError: if it is no row of blocks with dense heads.
    """
    found = load_classifier(path)
    model = found.model
    mixes = model.config.mixes if isinstance(model, IsotropicModel) else ()
    if not isinstance(model, IsotropicModel) or not any(isinstance(one, Dense) for mix in mixes for one in mix.groups):
        raise ConfigError(
            f"{path} holds {found.label}, which has no dense heads on one map; a teacher is an isotropic model with "
            "dense heads, such as vit_micro"
        )
    return Teacher(path, found.label, model.requires_grad_(False), model.config, found.classes, found.preprocess)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _images(one: Preprocess) -> str:
    return f"images of {one.img_size[0]} x {one.img_size[1]} pixels in {one.channels} channel{'s' * (one.channels > 1)}"
