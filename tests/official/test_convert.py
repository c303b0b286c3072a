"""attnkit convert: from the authors' file to predictions, in two commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import attnkit
from attnkit.cli import main
from attnkit_models import export_official
from attnkit_models.train.predict import load_classifier


@pytest.fixture
def micro(golden, tmp_path):
    """A flax-like model of ten classes as a PyTorch file, and its arguments."""
    one = golden("qna/qna_vit_micro")
    torch.save({"params": one.state}, tmp_path / "theirs.pth")
    (tmp_path / "hparams.json").write_text(json.dumps(one.hparams), encoding="utf-8")
    return one


def test_a_converted_file_predicts(micro, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"), encoding="utf-8")
    source, target = str(tmp_path / "theirs.pth"), tmp_path / "ours.safetensors"
    options = ["--model", "qna_vit", "--hparams", str(tmp_path / "hparams.json")]
    options += ["--classes", str(tmp_path / "classes.txt")]
    assert main(["convert", source, str(target), *options]) == 0
    assert capsys.readouterr().out == f"{target}: qna_vit, 154,122 parameters, 0.6 MB\n"
    classifier = load_classifier(target)
    assert classifier.classes == tuple("abcdefghij") and classifier.preprocess.img_size == (64, 64)
    micro.check(classifier.model(micro.tensors["input"].permute(0, 3, 1, 2)), "output")
    again = export_official("qna_vit", classifier.model)
    assert all(torch.equal(again[key], micro.state[key]) for key in micro.state)

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(target), str(tmp_path / "a.png"), "--top", "10"]) == 0
    names = [part.split()[0] for part in capsys.readouterr().out.partition(": ")[2].split(", ")]
    assert sorted(names) == sorted("abcdefghij")


def test_a_released_model(tmp_path, capsys):
    torch.save({"model": export_official("biformer_tiny", attnkit.build("biformer_tiny"))}, tmp_path / "a.pth")
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "a.pth"), str(target), "--model", "biformer_tiny"]) == 0
    assert "13,142,760 parameters" in capsys.readouterr().out
    classifier = load_classifier(target)
    assert classifier.classes[999] == "class 999" and classifier.preprocess.img_size == (224, 224)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--model": "qna_vit_tinny"}, "unknown official model 'qna_vit_tinny'; did you mean 'qna_vit_tiny'?"),
        ({"--model": "qna_vit"}, "'qna_vit' is a family and needs hparams"),
        ({"SRC": "nowhere.pth"}, "checkpoint nowhere.pth cannot be read: No such file or directory"),
        ({"DST": "."}, ". is a folder; name the file to write, such as qna_vit_tiny.safetensors"),
        ({"DST": "no/b.safetensors"}, "there is no folder no to write b.safetensors to; make it first"),
        ({"DST": "there.safetensors"}, "there.safetensors already exists; replace it with --overwrite"),
        ({"DST": "out.pth"}, "out.pth must end in .safetensors, which is what is written, such as out.safetensors"),
        ({"--hparams": "no.yaml"}, "--hparams no.yaml cannot be read: [Errno 2] No such file"),
        ({"--hparams": "list.yaml"}, "--hparams list.yaml must hold names and values, such as num_classes: 1000"),
        ({}, "the state dict for 'qna_vit_tiny' does not fit"),
        ({"--classes": "list.yaml", "--model": "qna_vit", "--hparams": "hparams.json"}, "has 1 lines, but the model"),
        ({"--classes": "no.txt", "--model": "qna_vit", "--hparams": "hparams.json"}, "--classes no.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line(micro, tmp_path, monkeypatch, capsys, changes, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "list.yaml").write_text("[1, 2]", encoding="utf-8")
    given = {"SRC": "theirs.pth", "DST": "b.safetensors", "--model": "qna_vit_tiny", **changes}
    source, target = given.pop("SRC"), given.pop("DST")
    options = [text for pair in given.items() for text in pair]
    assert main(["convert", source, target, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert not (tmp_path / "b.safetensors").exists()
