"""One image file to one tensor: what training and prediction both read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attnkit.cli.sizes import LARGEST
from attnkit.errors import DataError, shown
from attnkit_models.train.paths import is_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


@dataclass(frozen=True)
class Preprocess:
    """What turns an image file into a model's input, the same in training and prediction.

    Args:
        img_size: height and width in pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        mean: mean of each channel over the training images, for values in [0, 1].
        std: standard deviation of each channel.
    """

    img_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """`(images - mean) / std`, for images (B, channels, H, W) with values in [0, 1]."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        return (images - mean) / std

    def read(self, path: Path) -> Tensor:
        """Reads and normalises an image file: (1, channels, H, W)."""
        pixels = read_image(path, self.img_size, self.channels)
        return self.normalise(pixels[None].float() / 255)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's metadata."""
        return {
            "img_size": list(self.img_size),
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`.

        Raises:
            ValueError: with the reason, for what cannot be used.
            KeyError: if something is missing.
            TypeError: if something is no list or mapping where there should be one.
        """
        size, channels = tuple(plain["img_size"]), plain["channels"]
        mean, std = tuple(plain["mean"]), tuple(plain["std"])
        if len(size) != 2 or not all(type(side) is int and 1 <= side <= LARGEST for side in size):
            raise ValueError(f"img_size={shown(size)} is no height and width in pixels")
        if type(channels) is not int or channels not in (1, 3):
            raise ValueError(f"channels={shown(channels)} is neither 1 nor 3")
        if not all(type(one) in (int, float) and math.isfinite(one) for one in (*mean, *std)) or not all(
            len(one) == channels for one in (mean, std)
        ):
            raise ValueError(f"mean={shown(mean)} and std={shown(std)} are no finite numbers for {channels} channels")
        if min(std) <= 0:
            raise ValueError(f"std={std} is not positive")
        return cls(size, channels, mean, std)


def channel_statistics(sums: Sequence[Tensor], pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel.

    Args:
        sums: sum and sum of squares of each channel, two tensors (channels,) in float64.
        pixels: how many values were summed in each channel, >= 1.
    """
    mean = sums[0] / pixels
    # A data set of one colour would otherwise be divided by zero.
    std = (sums[1] / pixels - mean**2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist())


def pixel_sums(pixels: Tensor) -> Tensor:
    """Sum and sum of squares of each channel of eight-bit pixels (..., channels, H, W), scaled to [0, 1].

    Returns:
        (2, channels) in float64; counted value by value, so that no copy of the pixels is made.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = pixels.movedim(-3, 0)
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in channels]).double()
    return torch.stack([counts @ values, counts @ values**2])


def read_image(path: Path, img_size: tuple[int, int], channels: int) -> Tensor:
    """Reads an image file, scaled to cover the wanted size and cropped around its centre.

    Args:
        path: a file in any format Pillow reads.
        img_size: height and width in pixels.
        channels: 1 for grey, 3 for red, green, blue.

    Returns:
        (channels, H, W) in uint8.

    Raises:
        DataError: if there is no such file, or it is empty, truncated, or no image.
    """
    if not is_file(path):
        raise DataError(f"there is no image file {path}")
    if path.stat().st_size == 0:
        raise DataError(f"image {path} is an empty file (0 bytes)")
    try:
        with Image.open(path) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        if min(upright.size) < 1:
            raise DataError(f"image {path} has {upright.width} x {upright.height} pixels; it needs at least 1 x 1")
        eight_bit = _eight_bit(upright, path).convert("L" if channels == 1 else "RGB")
    except DataError:
        raise
    # A decoder that meets a broken file raises whatever its parsing ran into, not only OSError.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path} cannot be read ({reason})") from error
    fitted = ImageOps.fit(eight_bit, (img_size[1], img_size[0]), method=Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(fitted, dtype=numpy.uint8))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _eight_bit(picture: Image.Image, path: Path) -> Image.Image:
    """Pillow clips deeper pixels to 255 instead of scaling them."""
    if picture.mode.startswith("I"):
        values = numpy.asarray(picture, dtype=numpy.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"image {path} has pixel values {values.min()} to {values.max()}; save it with 8 or 16 bits"
            )
        return Image.fromarray((values // 257).astype(numpy.uint8))
    if picture.mode == "F":
        raise DataError(f"image {path} has floating-point pixels; save it with 8 or 16 bits a channel")
    # Pillow warns about palettes with transparency unless they pass through RGBA.
    return picture.convert("RGBA") if "transparency" in picture.info else picture
