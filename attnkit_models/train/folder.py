"""A folder of class folders of images, checked image by image before training starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnkit.errors import ConfigError, DataError
from attnkit_models.train.augment import Augmentation
from attnkit_models.train.data import ImageData, ImageSet, stratified_split
from attnkit_models.train.images import SUFFIXES, Preprocess, channel_statistics, pixel_sums, read_image
from attnkit_models.train.paths import is_file, is_folder
from attnkit_models.train.room import DECODERS

VALIDATION_NAMES = ("val", "test", "valid", "validation")
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class _Decoded:
    """What checking one image left: its pixels where they are kept, its sums, or why it cannot be read."""

    pixels: Tensor | None = None
    sums: Tensor | None = None
    problem: str = ""


def image_folder(
    root: Path,
    img_size: tuple[int, int],
    channels: int | None = None,
    *,
    skip_bad: bool = False,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> ImageData:
    """Reads `root/train/CLASS/...` and `root/val/CLASS/...`, or `root/CLASS/...` and holds out a fixed fifth.

    Args:
        root: the folder.
        img_size: height and width in pixels that every image is scaled and cropped to.
        channels: 1 to read grey, 3 or None to read red, green and blue.
        skip_bad: leave unreadable images out, and say so, instead of stopping.
        progress: wraps the iteration over all images: progress(iterable, total).

    Raises:
        ConfigError: if `channels` is neither 1 nor 3.
        DataError: if the folder, a class or an image is missing, empty or unreadable.
    """
    if channels not in (None, 1, 3):
        raise ConfigError(f"in_chans={channels}: image files are read with 3 channels (colour) or 1 (grey); choose one")
    channels = channels or 3
    folders = _parts(root)
    listed = [_list_classes(folder) for folder in folders]
    classes = tuple(listed[0])
    if len(classes) < 2:
        raise DataError(
            f"{folders[0]} has only the class folder {', '.join(classes)}; training needs at least 2 classes"
        )
    notes = _ignored(folders)
    if len(listed) == 2:
        notes += _compare_classes(listed[0], listed[1], folders)
    entries = [
        (part, name, file) for part, found in enumerate(listed) for name, files in found.items() for file in files
    ]
    keep = len(entries) * channels * img_size[0] * img_size[1] <= CACHE_BYTES

    def decode(entry: tuple[int, str, Path]) -> _Decoded:
        try:
            pixels = read_image(entry[2], img_size, channels)
        except DataError as error:
            return _Decoded(problem=str(error))
        return _Decoded(pixels if keep else None, pixel_sums(pixels))

    with ThreadPoolExecutor(max_workers=min(DECODERS, os.cpu_count() or 1)) as pool:
        results = pool.map(decode, entries)
        decoded = list(progress(results, len(entries)) if progress else results)
    bad = [result.problem for result in decoded if result.problem]
    if bad and not skip_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; mend or remove what cannot be read, or pass --skip-bad to train without")
    if bad:
        notes.append(
            f"skipped {len(bad)} of {len(entries)} images: " + "; ".join(bad[:3]) + ("; ..." if bad[3:] else "")
        )
    good = [(entry, result) for entry, result in zip(entries, decoded, strict=True) if not result.problem]
    _check_counts(good, classes, folders)

    labels = torch.tensor([classes.index(entry[1]) for entry, _ in good])
    part = torch.tensor([entry[0] for entry, _ in good])
    if len(folders) == 2:
        train, val = (part == 0).nonzero().flatten(), (part == 1).nonzero().flatten()
    else:
        train, val = stratified_split(labels)
    total = torch.stack([good[one][1].sums for one in train.tolist()]).sum(0)  # pyright: ignore[reportArgumentType]
    mean, std = channel_statistics([total[0], total[1]], len(train) * img_size[0] * img_size[1])
    preprocess = Preprocess(img_size, channels, mean, std)
    sets = []
    for chosen in (train, val):
        picked = [good[one] for one in chosen.tolist()]
        pixels = torch.stack([result.pixels for _, result in picked]) if keep else None  # pyright: ignore
        sets.append(ImageSet(labels[chosen], preprocess, pixels=pixels, files=[entry[2] for entry, _ in picked]))
    return ImageData(
        name=str(root),
        classes=classes,
        train=sets[0],
        val=sets[1],
        preprocess=preprocess,
        augmentation=Augmentation(degrees=10, shift=0.08, zoom=0.25, mirror=True, border="reflection"),
        fingerprint=_fingerprint([entry[2] for entry, _ in good], val, root),
        notes=tuple(notes),
    )


def _parts(root: Path) -> list[Path]:
    """The folders that hold class folders: `[root]`, or `[root/train, root/val]`."""
    if not is_folder(root):
        what = "is a file" if is_file(root) else "does not exist"
        raise DataError(f"data folder {root} {what}; pass a folder of class folders, such as {root}/cat/1.jpg")
    inside = [folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    held_out = [name for name in VALIDATION_NAMES if name in inside]
    if "train" not in inside:
        return [root]
    if held_out:
        return [root / "train", root / held_out[0]]
    if any(folder.is_dir() for folder in (root / "train").iterdir()):
        raise DataError(
            f"{root}/train has no {root}/val or {root}/test beside it; add one, or pass --data {root}/train"
        )
    return [root]


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class names, sorted, each with its image files, sorted."""
    names = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not names:
        loose = sum(one.suffix.lower() in SUFFIXES for one in folder.iterdir())
        holds = f"holds {loose} image{'s' * (loose != 1)} but no class folders" if loose else "is empty"
        raise DataError(
            f"data folder {folder} {holds}; put the images of each class in a folder of its own, "
            f"such as {folder}/cat/1.jpg"
        )
    found = {}
    for name in names:
        files = [
            one for one in (folder / name).rglob("*") if one.suffix.lower() in SUFFIXES and not one.name.startswith(".")
        ]
        if not files:
            raise DataError(
                f"class folder {folder / name} holds no image ({' '.join(SUFFIXES)}); add some or remove it"
            )
        found[name] = sorted(files)
    return found


def _compare_classes(train: dict[str, list[Path]], val: dict[str, list[Path]], folders: list[Path]) -> list[str]:
    unseen = [name for name in val if name not in train]
    if unseen:
        count = len(val[unseen[0]])
        raise DataError(
            f"{folders[1]} has the class {unseen[0]!r} ({count} image{'s' * (count != 1)}) that {folders[0]} "
            f"does not have; add it there or remove it here (classes in training: {', '.join(train)})"
        )
    absent = [name for name in train if name not in val]
    return [f"{folders[1]} has no images of {', '.join(absent)}, so these are not tested"] if absent else []


def _ignored(folders: list[Path]) -> list[str]:
    others = [
        file
        for folder in folders
        for file in folder.glob("*/**/*")
        if file.is_file() and file.suffix.lower() not in SUFFIXES and not file.name.startswith(".")
    ]
    if not others:
        return []
    if len(others) == 1:
        return [f"ignored 1 file that is no image by its name: {others[0]}"]
    return [f"ignored {len(others)} files that are no images by their names, such as {min(others)}"]


def _check_counts(good: list, classes: tuple[str, ...], folders: list[Path]) -> None:
    """After bad images left: is there still enough of everything?"""
    needed = 1 if len(folders) == 2 else 2
    for name in classes:
        count = sum(entry[0] == 0 and entry[1] == name for entry, _ in good)
        if count < needed:
            raise DataError(
                f"class folder {folders[0] / name} has {count} readable image{'s' * (count != 1)}; "
                f"it needs at least {needed}" + (", one to train on and one to test with" if needed == 2 else "")
            )
    if len(folders) == 2 and not any(entry[0] == 1 for entry, _ in good):
        raise DataError(f"{folders[1]} has no readable image to test with")


def _fingerprint(files: list[Path], val: Tensor, root: Path) -> str:
    listing = "\n".join(f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files)
    return hashlib.sha256(listing.encode() + val.numpy().tobytes()).hexdigest()[:16]
