"""What is trained on: images with labels, cut into a training and a validation part that never changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnkit.errors import ConfigError
from attnkit_models.train.augment import Augmentation
from attnkit_models.train.images import Preprocess, channel_statistics, pixel_sums, read_image

# Images of handwritten digits in scikit-learn.
DIGITS = 1797
SPLIT_SEED = 0
VALIDATION_SHARE = 0.2


class ImageSet(Dataset):
    """Labelled images, decoded beforehand or read from their files on use.

    Args:
        labels: class index of each image, (N,).
        preprocess: size and channels of what comes out.
        pixels: all images (N, channels, H, W) in uint8, or None to read `files`.
        files: the images' files, where there are any.
    """

    def __init__(
        self,
        labels: Tensor,
        preprocess: Preprocess,
        *,
        pixels: Tensor | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self.labels = labels
        self.preprocess = preprocess
        self.pixels = pixels
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: `pixels` (B, channels, H, W) uint8, `label` (B,), `index` (B,)."""
        index = torch.tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            pixels = self.pixels[index]
        else:
            size, channels = self.preprocess.img_size, self.preprocess.channels
            pixels = torch.stack([read_image(self.files[one], size, channels) for one in indices])
        return {"pixels": pixels, "label": self.labels[index], "index": index}


@dataclass(frozen=True)
class ImageData:
    """A data set ready to train on.

    Args:
        name: what it is called in reports.
        classes: class names, in the order of the labels.
        train: training images.
        val: held-out images, whose accuracy is reported.
        preprocess: how image files become inputs.
        augmentation: how training images are varied.
        fingerprint: changes whenever images, labels or the split do.
        notes: what the reader should know, one sentence each.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    preprocess: Preprocess
    augmentation: Augmentation
    fingerprint: str
    notes: tuple[str, ...] = field(default=())


def stratified_split(
    labels: Tensor, *, share: float = VALIDATION_SHARE, seed: int = SPLIT_SEED
) -> tuple[Tensor, Tensor]:
    """Indices of a training and a validation part, with the same class proportions in both.

    The second has `ceil(share * N)` images where that leaves each class at least one in both parts. Classes
    take their whole share first; images still missing come from the classes with the largest remainders.

    Args:
        labels: class index of each image, (N,); each class at least twice.
        share: share of the images that validation gets, in (0, 1).
        seed: of the shuffle inside each class.
    """
    counts = torch.bincount(labels).tolist()
    wanted = math.ceil(share * len(labels))
    taken = [min(max(int(share * count), 1), count - 1) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda one: (taken[one] - share * counts[one], one))
    for one in by_remainder:
        if sum(taken) < wanted and taken[one] + 1 < counts[one]:
            taken[one] += 1
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for one, amount in enumerate(taken):
        members = (labels == one).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        val.append(shuffled[:amount])
        train.append(shuffled[amount:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


def digits(img_size: tuple[int, int], channels: int | None = None) -> ImageData:
    """The 1,797 handwritten digits (8 x 8 pixels, 43 people) that come with scikit-learn, scaled up.

    Args:
        img_size: height and width in pixels to scale to.
        channels: what a configuration asks for; must be None or 1.

    Raises:
        ConfigError: if another number of channels is asked for.
    """
    from sklearn.datasets import load_digits

    if channels not in (None, 1):
        raise ConfigError(f"in_chans={channels}: the digits are grey images with 1 channel; leave in_chans out")
    source: Any = load_digits()
    grey = torch.from_numpy(source.images).float()[:, None] / 16
    pixels = torch.cat([_scaled(some, img_size) for some in grey.split(64)])
    labels = torch.from_numpy(source.target).long()
    train, val = stratified_split(labels)
    seen = pixels[train]
    mean, std = channel_statistics(list(pixel_sums(seen)), seen.numel())
    preprocess = Preprocess(img_size, 1, mean, std)
    parts = [ImageSet(labels[train], preprocess, pixels=seen), ImageSet(labels[val], preprocess, pixels=pixels[val])]
    return ImageData(
        name="handwritten digits",
        classes=tuple(str(name) for name in source.target_names),
        train=parts[0],
        val=parts[1],
        preprocess=preprocess,
        augmentation=Augmentation(degrees=10, shift=0.06, zoom=0.1, mirror=False, border="zeros"),
        fingerprint=_fingerprint(pixels, val),
    )


def _scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 1, h, w) with values in [0, 1] at another size, in uint8."""
    scaled = torch.nn.functional.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
    return (scaled.clamp(0, 1) * 255).round().to(torch.uint8)


def _fingerprint(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy())  # pyright: ignore[reportArgumentType] (NumPy declares no buffer)
    return digest.hexdigest()[:16]
