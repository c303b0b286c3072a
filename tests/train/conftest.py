"""Small data sets and a model small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image


@pytest.fixture(autouse=True)
def forget_accelerator() -> Iterator[None]:
    """Lets each test choose its precision: accelerate remembers the first choice of a process."""
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(name, cat=5, dog=5) writes that many images of each class and returns the folder."""

    def make(name: str = "data", size: tuple[int, int] = (20, 16), **classes: int) -> Path:
        root = tmp_path / name
        root.mkdir(parents=True, exist_ok=True)
        for label, (kind, count) in enumerate(classes.items()):
            (root / kind).mkdir()
            noise = numpy.random.default_rng(label).integers(0, 90, (count, *size, 3))
            noise[..., label % 3] += 120
            for index, pixels in enumerate(noise.astype(numpy.uint8)):
                Image.fromarray(pixels).save(root / kind / f"{index}.png")
        return root

    return make


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A configuration file of the tiny model for 16 x 16 pixels, two epochs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model:\n  kind: bigbird_vit_micro\n  drop_path: 0.2\n"
        "train:\n  epochs: 2\n  warmup: 1\n  img_size: 16\n  batch_size: 8\n  lr: 1e-3\n",
        encoding="utf-8",
    )
    return path
