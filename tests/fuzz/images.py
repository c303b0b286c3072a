"""Image files and folders of them: damaged, oddly named, of every format, and where images are not expected."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attnkit.errors import AttnkitError
from attnkit_models.train.folder import image_folder
from attnkit_models.train.images import read_image
from tests.fuzz.case import agree
from tests.fuzz.mutation import mutate_bytes

FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "ICO": ("RGBA",),
}


def case(dice: random.Random, folder: Path) -> None:
    if dice.random() < 0.6:
        _one(dice, folder)
    else:
        _folder(dice, folder)


@functools.cache
def _content(kind: str, mode: str, seed: int) -> bytes:
    """An intact image file of a few pixels a side."""
    dice = random.Random(seed)
    width, height = dice.randint(1, 20), dice.randint(1, 20)
    if mode in ("I;16", "I", "F"):
        picture = Image.new(mode, (width, height), dice.choice((0, 7, 60_000)))
    else:
        picture = Image.effect_noise((width, height), 50).convert("RGB").convert(mode if mode != "LAB" else "RGB")
        picture = Image.new("LAB", (width, height)) if mode == "LAB" else picture
    file = io.BytesIO()
    exif = Image.Exif()
    if dice.random() < 0.5:
        exif[0x0112] = dice.randint(0, 9)
    extra: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    if kind in ("PNG", "GIF") and mode == "P" and dice.random() < 0.5:
        extra["transparency"] = 0
    picture.save(file, kind, **extra)
    return file.getvalue()


def _image(dice: random.Random, damaged: float) -> tuple[bytes, str]:
    """A file's content, and an ending for its name, mostly the right one."""
    kind = dice.choice(list(FORMATS))
    content = _content(kind, dice.choice(FORMATS[kind]), dice.randrange(20))
    if dice.random() < damaged:
        content = mutate_bytes(content, dice, dice.randint(1, 3))
    ending = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    return content, ending if dice.random() < 0.9 else dice.choice((".png", ".JPG", ".txt", ".npy", ""))


def _one(dice: random.Random, folder: Path) -> None:
    content, ending = _image(dice, 0.45)
    file = folder / f"a{ending}"
    file.write_bytes(content)
    if dice.random() < 0.05:
        file = dice.choice((folder, folder / "none.png", folder / ("a" * 300 + ".png"), folder / "a\x00.png"))
    size, channels = (dice.randint(1, 24), dice.randint(1, 24)), dice.choice((1, 3))
    found = read_image(file, size, channels)
    agree(found.shape == (channels, *size) and found.dtype == torch.uint8, "an image of another shape than asked for")
    agree(torch.equal(found, read_image(file, size, channels)), "an image read twice differs")


def _folder(dice: random.Random, folder: Path) -> None:
    root = folder / "data"
    root.mkdir()
    parts = dice.choice((("",), ("",), ("train", "val"), ("train", "test"), ("train",), ("train", "valid", "x")))
    damaged = dice.choice((0.0, 0.0, 0.0, 0.3))
    names = dice.sample(
        ("cat", "dog", "ü n", "-x", ".hidden", "train", "a'b", "c\td"), dice.choice((0, 1, *[2] * 5, *[3] * 5))
    )
    for part in parts:
        for name in names:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for at in range(dice.choice((2, 2, 3, 3, 4) if dice.random() < 0.95 else (0, 1))):
                content, ending = _image(dice, damaged)
                (root / part / name / f"{at}{ending}").write_bytes(content)
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        _litter(dice, root)
    skip_bad, size = dice.random() < 0.7, (dice.randint(1, 12), dice.randint(1, 12))
    channels = dice.choice((None, 1, 3, 3, 3)) if dice.random() < 0.9 else dice.choice((0, 2, "3", -1))
    where = root if dice.random() < 0.95 else dice.choice((root / "none", folder, root / "x\x00"))
    found = image_folder(where, size, channels, skip_bad=skip_bad)
    again = image_folder(where, size, channels, skip_bad=skip_bad)
    agree(found.fingerprint == again.fingerprint, "a folder read twice has two fingerprints")
    agree(len(found.train) > 0 and len(found.val) > 0, "nothing to train on or to test with")
    for part in (found.train, found.val):
        batch = part.__getitems__(range(len(part)))
        agree(
            tuple(batch["pixels"].shape) == (len(part), channels or 3, *size), "images of another shape than asked for"
        )
        agree(bool((batch["label"] < len(found.classes)).all()), "a label without a class")


def _litter(dice: random.Random, root: Path) -> None:
    """Something that is no image where images are expected."""
    folders = [root, *(one for one in root.rglob("*") if one.is_dir() and not one.is_symlink())]
    where = dice.choice(folders)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: (where / "empty.png").write_bytes(b""),
        lambda: (where / "notes.txt").write_text("x"),
        (where / "folder.png").mkdir,
        lambda: (where / "loop").symlink_to(root, target_is_directory=True),
        lambda: (where / "self.png").symlink_to(where / "self.png"),
        lambda: (where / "gone.png").symlink_to(root / "nowhere.png"),
        lambda: (where / "train").write_bytes(b""),
        (where / "val").mkdir,
        lambda: (where / ".DS_Store").write_bytes(b"x"),
    )
    try:
        dice.choice(ways)()
    except (FileExistsError, IsADirectoryError):
        raise AttnkitError("two odd things of one name were asked for") from None
