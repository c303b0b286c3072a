"""`attnkit predict`: classes of image files, from a checkpoint that says everything else itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import attnkit
from attnkit.errors import CheckpointError, ConfigError, DataError, shown
from attnkit_models.train.checkpoint import check_weights, load_weights, read_header, read_weights
from attnkit_models.train.images import Preprocess
from attnkit_models.train.rundir import find_weights


@dataclass(frozen=True)
class Classifier:
    """A trained model with all it takes to use it.

    Args:
        model: in eval mode, on the CPU.
        classes: class names, in the order of the logits.
        preprocess: how image files become inputs.
        label: the model's name in its run.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocess: Preprocess
    label: str

    @torch.no_grad()
    def __call__(self, image: Path, *, top: int = 3) -> list[tuple[str, float]]:
        """The `top` likeliest classes of an image file with their probabilities, likeliest first."""
        probabilities = self.probabilities(self.preprocess.read(image))
        best = probabilities.topk(min(top, len(self.classes)))
        return [
            (self.classes[one], value) for one, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """The probability of every class, (classes,), for an image (1, channels, H, W) as `preprocess` reads it."""
        logits = self.model(pixels)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, len(self.classes)):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CheckpointError(
                f"{self.label} gives {got} for one image, but its checkpoint names {len(self.classes)} classes; "
                "train it again"
            )
        return logits.float().softmax(dim=-1)[0]


def load_classifier(path: str | os.PathLike[str], *, build: Callable[..., nn.Module] | None = None) -> Classifier:
    """Restores a model from a checkpoint alone.

    Args:
        path: a `best.safetensors` or `last.safetensors`, or the folder of a run.
        build: what makes the model from its plain configuration; `attnkit.build` if None.

    Raises:
        CheckpointError: if the path holds no such checkpoint, or its weights do not fit its model.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a model is read from a path such as 'runs/best.safetensors', but got {shown(path)}")
    weights = find_weights(Path(path))
    header = read_header(weights)
    if header.get("kind") != "weights":
        raise CheckpointError(f"{weights} is a training state; pass the best.safetensors or last.safetensors beside it")
    try:
        config, classes = header["model"], header["classes"]
        preprocess = Preprocess.from_dict(header["preprocess"])
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"classes={shown(classes)} is no list of names")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{weights} does not say how to use it ({reason}); train it again") from error
    tensors = read_weights(weights)
    make = build or attnkit.build
    try:
        # Without memory first: a configuration may ask for any amount of it, the weights' file cannot.
        with torch.device("meta"):
            check_weights(make(config), tensors, source=str(weights))
        model = make(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{weights} describes a model that cannot be built ({' '.join(str(error).split())})"
        ) from error
    load_weights(model, tensors, source=str(weights))
    label = header.get("label")
    return Classifier(
        model.eval(), tuple(classes), preprocess, label if isinstance(label, str) else type(model).__name__
    )


def draw_image(checkpoint: str, image: Path, out: str) -> None:
    """Draws what a trained model attends to on an image file, under the class it predicts."""
    from attnkit_models.train.pictures import predicted

    classifier = load_classifier(Path(checkpoint))
    pixels = classifier.preprocess.read(image)
    classifier.probabilities(pixels)  # the checkpoint's model and classes belong together
    title = predicted(classifier.model, pixels, classifier.classes)
    attnkit.analysis.draw_attention(classifier.model, pixels, out, title=title)


def predict(
    checkpoint: Path, images: Sequence[Path], *, top: int = 3, build: Callable[..., nn.Module] | None = None
) -> Iterator[list[tuple[str, float]] | DataError]:
    """Classifies image files one by one: the `top` likeliest classes of each with their probabilities.

    Args:
        checkpoint: a checkpoint or the folder of a run.
        images: image files.
        top: how many classes to give, >= 1.
        build: what makes the model from its plain configuration; `attnkit.build` if None.

    Yields:
        For each image its classes, likeliest first; for one that cannot be read, the error that says why.

    Raises:
        ConfigError: if there is no image or `top` is less than 1.
        CheckpointError: if the checkpoint cannot be used.
    """
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    if not images:
        raise ConfigError("predict needs at least one image file, but got none")
    classifier = load_classifier(checkpoint, build=build)
    for image in images:
        try:
            found = classifier(image, top=top)
        except DataError as error:
            yield error
        else:
            yield found
