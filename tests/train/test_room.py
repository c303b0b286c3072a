"""Sizes that no machine or no model can train on: one sentence, before anything is written."""

from __future__ import annotations

import pytest
import torch

from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit_models.train import fit
from attnkit_models.train.images import pixel_sums
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.order import smallest_batch
from attnkit_models.train.room import check_size, enough_memory


@pytest.fixture
def fails(capsys, make_folder, tmp_path, monkeypatch):
    """fails("--img-size", 9) is what training on a small folder says in its one line of error."""
    data = make_folder(a=5, b=5)
    monkeypatch.setattr("attnkit_models.train.room.installed_memory", lambda: 16 * 10**9)

    def run(model, *arguments, data=data):
        source = ["--data", str(data)] if data else []
        command = ["train", "--model", model, *source, "--epochs", "1", *map(str, arguments)]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        output = capsys.readouterr().err
        assert output.startswith("error: ") and output.count("\n") == 1
        return output

    return run


@pytest.mark.parametrize("size", ["100000", "17x16385"])
def test_sizes_beyond_counting(fails, size):
    assert f"--img-size {size} is too large" in fails("vit_micro", "--img-size", size)


def test_images_that_no_memory_holds(fails, tmp_path):
    told = "need at least 197 GB of memory with batch_size=64, and this machine has 16 GB; choose a smaller img_size"
    assert f"img_size=16000 x 16000: images of that size {told}" in fails("vit_micro", "--img-size", 16000)
    assert "of memory with batch_size=1, and this" in fails("vit_micro", "--img-size", 16000, "--batch-size", 1)
    assert "img_size=3000 x 3000" in fails("vit_micro", "--img-size", 3000, "--batch-size", 8, data=None)
    assert not (tmp_path / "out").exists()


def test_images_that_memory_holds(monkeypatch):
    check_size((512, 512), 3, batch=64, kept=1797)
    monkeypatch.setattr("attnkit_models.train.room.installed_memory", lambda: None)
    check_size((10**9, 10**9), 3, batch=64)


def test_batch_norms_and_single_pixels(fails):
    told = "batch norm cannot train on one image that has shrunk to one token"
    assert told in fails("biformer_micro", "--img-size", 1, "--batch-size", 1)
    # Eight training images in batches of seven.
    assert told in fails("biformer_micro", "--img-size", 1, "--batch-size", 7, "--grad-accum", 2)


def test_a_model_takes_single_pixels(make_folder, tmp_path):
    command = ["train", "--model", "bigbird_vit_micro", "--epochs", "1", "--img-size", "1", "--batch-size", "1"]
    assert main([*command, "--data", str(make_folder(a=2, b=2)), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("images", "batch", "groups", "processes", "fewest"),
    [(10, 4, 1, 1, 4), (10, 4, 3, 1, 2), (3, 4, 1, 1, 3), (10, 4, 1, 2, 2), (10, 2, 1, 2, 1), (5, 4, 2, 4, 1)],
)
def test_the_smallest_batch(images, batch, groups, processes, fewest):
    assert smallest_batch(images, TrainOptions(batch_size=batch, grad_accum=groups), processes) == fewest


def too_much(*_):
    torch.empty(2**60)


def test_memory_that_runs_out_in_training(fails, monkeypatch):
    monkeypatch.setattr(fit, "train_epoch", too_much)
    told = fails("vit_micro", "--img-size", 8, "--batch-size", 4)
    assert "not enough memory to train vit_micro with batch_size=4; choose a smaller --batch-size" in told


def test_memory_that_runs_out_before_training(fails, monkeypatch):
    monkeypatch.setattr("attnkit_models.train.task.adamw", too_much)
    told = fails("vit_micro", "--img-size", 8, "--batch-size", 4)
    assert "not enough memory to train vit_micro on 2 images of 8 x 8 pixels; choose a smaller --img-size" in told


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_every_allocator_is_heard(error):
    with (
        pytest.raises(ConfigError, match="there is not enough memory for this; buy some"),
        enough_memory("for this", "buy some"),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="a bug") as caught, enough_memory("for this", "buy some"):
        raise RuntimeError("a bug")
    assert not isinstance(caught.value, ConfigError)


def test_sums_of_pixels_are_those_of_their_values():
    pixels = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    values = pixels.double() / 255
    expected = torch.stack([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
    torch.testing.assert_close(pixel_sums(pixels), expected)
    torch.testing.assert_close(
        pixel_sums(pixels[0]), torch.stack([values[0].sum((1, 2)), (values[0] ** 2).sum((1, 2))])
    )
