"""Files are written whole or not at all, and weights go into their own model only."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import attnkit
from attnkit.errors import CheckpointError, ConfigError, DataError
from attnkit_models.train import checkpoint, rundir
from attnkit_models.train.checkpoint import load_weights, pack, read_header, read_weights, write_atomically
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.predict import load_classifier, predict
from attnkit_models.train.progress import Reporter
from attnkit_models.train.run import Choice, train

OPTIONS = TrainOptions(epochs=3, warmup=1, batch_size=8, img_size=16)


def start(data, out, **flags):
    return train(
        [Choice("v", "vit_micro")], out=out, data=data, options=OPTIONS, reporter=Reporter(main=False), **flags
    )


def test_writing_replaces_whole_files(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if step == "fsync" else (Path, "replace", full)))
    with pytest.raises(CheckpointError, match=r"cannot write .*file: No space left on device; free at least 0\.1 MB"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "resume.safetensors"])
def test_a_disk_that_fills_up_while_training_keeps_the_last_epoch(make_folder, tmp_path, monkeypatch, name):
    data, out = make_folder(a=5, b=5), tmp_path / "run"
    room, replace = {"best.safetensors": 0, "last.safetensors": 1, "resume.safetensors": 2}[name], Path.replace

    def filling(self, target):
        nonlocal room
        if target.name == name:
            room -= 1
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", filling)
        with pytest.raises(CheckpointError, match=rf"cannot write \S*{name}: No space left.*--resume \(.*epoch"):
            start(data, out)
    for file in out.rglob("*.safetensors"):
        assert read_weights(file)
    start(data, out, resume=True)
    start(data, tmp_path / "whole")
    assert (out / "last.safetensors").read_bytes() == (tmp_path / "whole" / "last.safetensors").read_bytes()


def test_a_folder_that_cannot_be_written_to_is_found_before_training(make_folder, tmp_path, monkeypatch):
    data = make_folder(a=5, b=5)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot make the folder .*; choose another --out"):
        start(data, tmp_path / "file" / "run")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", read_only)
        with pytest.raises(CheckpointError, match=r"Read-only file system; choose another --out or make that folder"):
            start(data, tmp_path / "run")
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"has 0\.0 MB free, and the run needs about \d+\.\d MB"):
        start(data, tmp_path / "run")


def test_weights_of_another_model_are_refused_whole():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "2.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, other, source="x.safetensors")
    for said in (
        "x.safetensors holds the weights of another model than Sequential",
        "of its 4 tensors 2 missing (1.weight, 1.bias)",
        "1 unknown (2.weight)",
        "1 of another shape (0.bias (4,) instead of (3,))",
    ):
        assert said in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def written(path, header, tensors=None):
    path.write_bytes(pack(tensors or {"a": torch.ones(2)}, header))
    return path


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a safetensors checkpoint"):
        read_header(tmp_path / "text.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="does not say which model it belongs to"):
        read_header(tmp_path / "bare.safetensors")
    (tmp_path / "bare.json").write_text(json.dumps({"kind": "weights"}))
    assert read_header(tmp_path / "bare.safetensors") == {"kind": "weights"}
    with pytest.raises(CheckpointError, match=r"holds no best.safetensors"):
        load_classifier(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a training state; pass the best.safetensors"):
        load_classifier(written(tmp_path / "resume.safetensors", {"kind": "resume"}))
    with pytest.raises(CheckpointError, match="does not say how to use it"):
        load_classifier(written(tmp_path / "old.safetensors", {"kind": "weights", "model": {}}))


def test_predicting_with_what_does_not_fit(tmp_path):
    config = attnkit.build("vit_micro", num_classes=2, img_size=16, in_chans=1).config.to_dict(full=True)
    header = {
        "kind": "weights",
        "model": config,
        "classes": ["a", "b"],
        "preprocess": {"img_size": [16, 16], "channels": 1, "mean": [0.5], "std": [0.5]},
    }
    path = written(tmp_path / "other.safetensors", header)
    with pytest.raises(CheckpointError, match=r"weights of another model than \w+: of its \d+ tensors \d+ missing"):
        list(predict(path, [tmp_path / "a.png"]))
    with pytest.raises(ConfigError, match="top=0 must be at least 1"):
        list(predict(path, [tmp_path / "a.png"], top=0))
    with pytest.raises(ConfigError, match="at least one image"):
        list(predict(path, []))
    weights = attnkit.build(config).state_dict()
    good = written(tmp_path / "good.safetensors", header, weights)
    (tmp_path / "a.png").write_bytes(b"")
    missing, empty = predict(good, [tmp_path / "none.png", tmp_path / "a.png"])
    assert isinstance(missing, DataError) and "there is no image file" in str(missing)
    assert isinstance(empty, DataError) and "is an empty file" in str(empty)
