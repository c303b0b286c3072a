"""Options and configuration files: every mistake is named, with what would be right."""

from __future__ import annotations

import re

import pytest

from attnkit.errors import ConfigError
from attnkit_models.train.configfile import merge_options, read_config, read_overrides
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.run import Choice, train


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.1), (2, 0.2), (20, 2.0), (300, 2.0)])
def test_the_default_warm_up_fits_any_number_of_epochs(epochs, warmup):
    assert TrainOptions(epochs=epochs).warmup_epochs == warmup
    assert TrainOptions(epochs=epochs, warmup=0.0).warmup_epochs == 0
    with pytest.raises(ConfigError, match=rf"warmup={epochs}\): must be >= 0 and less than epochs={epochs}"):
        TrainOptions(epochs=epochs, warmup=epochs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs=0): must be >= 1"),
        ({"batch_size": -3}, "batch_size=-3): must be >= 1"),
        ({"grad_accum": 0}, "grad_accum=0): must be >= 1"),
        ({"img_size": 0}, "img_size=0): must be 1 to 16384 pixels"),
        ({"lr": 0.0}, "lr=0.0): must be > 0"),
        ({"lr": float("nan")}, "lr=nan): must be > 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1): must be >= 0"),
        ({"warmup": 50}, "warmup=50): must be >= 0 and less than epochs=20"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0): must be in [0, 1)"),
        ({"clip_grad": -1}, "clip_grad=-1): must be >= 0"),
        ({"seed": -1}, "seed=-1): must be in"),
        ({"workers": -1}, "workers=-1): must be >= 0"),
        ({"mixed_precision": "bf61"}, "did you mean 'bf16'?"),
        ({"epochs": "ten"}, "must be an integer"),
    ],
)
def test_values_that_cannot_be(wrong, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        TrainOptions(**wrong)


def test_the_command_line_overrules_the_file():
    options = merge_options({"epochs": 7, "lr": 0.1}, {"lr": 0.2, "seed": None})
    assert (options.epochs, options.lr, options.seed) == (7, 0.2, 0)


def test_all_mistakes_of_a_section_are_named_together():
    with pytest.raises(ConfigError) as caught:
        merge_options({"epohcs": 7, "lr": "fast"}, {})
    assert "unknown option 'epohcs'" in str(caught.value) and "did you mean 'epochs'?" in str(caught.value)
    assert "train.lr must be a number, but got 'fast'" in str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_files_with_and_without_sections(tmp_path):
    file = read_config(write(tmp_path, "model: vit_micro\ntrain: {lr: 1e-3}\nbaseline: vit_tiny\ndata: pictures\n"))
    assert (file.model, file.train, file.baseline, file.data) == ("vit_micro", {"lr": 0.001}, "vit_tiny", "pictures")
    assert read_config(write(tmp_path, "kind: vit_micro\ndrop_path: 0.1\n")).model == {
        "kind": "vit_micro",
        "drop_path": 0.1,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: vit_micro\ntrain: {}\n", "unknown section 'modle'; did you mean 'model'?"),
        ("model: [vit_micro]\n", "section 'model' must be a name or a mapping, but got ['vit_micro']"),
        ("model: {kind: [\n", "is not valid YAML"),
        ("", "must hold a model's options"),
        ("- a\n", "must hold a model's options"),
    ],
)
def test_files_that_cannot_be(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        read_config(tmp_path / "binary.yaml")


def test_overrides():
    assert read_overrides(["stages[0].depth=3", "size=[96, 160]", "rate=1e-2", "on=true"]) == {
        "stages[0].depth": 3,
        "size": [96, 160],
        "rate": 0.01,
        "on": True,
    }
    for wrong, said in (("depth", "must be path=value"), ("=3", "must be path=value"), ("a=[", "is not a YAML value")):
        with pytest.raises(ConfigError, match=said):
            read_overrides([wrong])
    with pytest.raises(ConfigError, match="twice"):
        read_overrides(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice("m", "vit_micor"), "unknown model 'vit_micor'; did you mean 'vit_micro'?"),
        (Choice("m", "vit_micro", {"num_classes": 3}), "num_classes=3, but there are 10 classes"),
        (Choice("m", "vit_micro", {"in_chans": 3}), "in_chans=3: the digits are grey images"),
        (Choice("m", "vit_micro", {"img_size": "big"}), "img_size='big' must be pixels a side"),
        (Choice("m", "bigbird_vit_micro", {"stages[0].dpeth": 3}), "did you mean 'depth'?"),
        (Choice("m", {"kind": "mix", "groups": []}), "mix"),
    ],
)
def test_models_that_cannot_be_trained_leave_nothing_behind(tmp_path, choice, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        train([choice], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_cannot_be_its_own_baseline(tmp_path):
    with pytest.raises(ConfigError, match="both called 'vit_micro'"):
        train([Choice("vit_micro", "vit_micro")] * 2, out=tmp_path / "out")


def test_fp16_needs_a_gpu(tmp_path):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(ConfigError, match="mixed_precision='fp16' needs a GPU; on this CPU use 'bf16' or 'no'"):
        train([Choice("m", "vit_micro")], out=tmp_path, options=TrainOptions(mixed_precision="fp16"))
