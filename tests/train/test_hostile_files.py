"""Files that are damaged or mean harm: one error, nothing executed, nothing loaded in part, nothing without bounds."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import attnkit
from attnkit.errors import AttnkitError, CheckpointError, ConfigError, DataError
from attnkit_models.train.checkpoint import load_weights, pack, read_header, read_weights
from attnkit_models.train.configfile import read_config, read_overrides
from attnkit_models.train.images import Preprocess, read_image
from attnkit_models.train.predict import load_classifier
from attnkit_models.train.resume import Progress, pack_state, read_progress, unpack_state
from attnkit_models.train.rundir import RunFolder, find_weights

PREPROCESS = {"img_size": [16, 16], "channels": 1, "mean": [0.5], "std": [0.5]}


def config(**changes):
    return attnkit.build("vit_micro", num_classes=2, img_size=16, in_chans=1, depth=1).config.to_dict() | changes


def checkpoint(path, **changes):
    header = {"kind": "weights", "model": config(), "classes": ["a", "b"], "preprocess": PREPROCESS}
    path.write_bytes(pack(attnkit.build(config()).state_dict(), header | changes))
    return path


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["weights.pth", "best.safetensors"])
@pytest.mark.parametrize("read", [load_classifier, read_header, read_weights, read_progress])
@pytest.mark.parametrize("archive", [True, False])
def test_pickles_are_never_opened(tmp_path, name, read, archive):
    file, payload = tmp_path / name, Payload(tmp_path / "executed")
    torch.save({"evil": payload}, file) if archive else file.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError):
        read(file)
    assert not payload.marker.exists()
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if archive else pickle.load(content)
    assert payload.marker.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5_000, "nested more than 100 levels deep"),
        ("model: " + "[" * 120 + "]" * 120, "nested more than 100 levels deep"),
        ("model: &a [*a]", "nested more than 100 levels deep"),
        ("model: 2001-99-99", "month must be in 1..12"),
        ("model: !!int x", "invalid literal for int()"),
        ("model: !!bool x", "'x'"),
        ("model: !!timestamp x", "AttributeError|NoneType"),
        ("model: " + "9" * 5000, "limit"),
        ("\n".join(["a0: &a0 [1, 1, 1]", *(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]" for n in range(9))]), "aliases"),
    ],
)
def test_yaml_that_means_harm(tmp_path, text, said):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"configuration file .*config.yaml is not valid YAML: .*({said})"):
        read_config(file)
    if "\n" not in text:
        with pytest.raises(ConfigError, match="is not a YAML value"):
            read_overrides([f"depth={text.removeprefix('model: ')}"])


def test_a_yaml_that_would_run_something(tmp_path):
    file, marker = tmp_path / "config.yaml", tmp_path / "executed"
    file.write_text(f'model: !!python/object/apply:os.system ["touch {marker}"]\n')
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        read_config(file)
    assert not marker.exists()


@pytest.mark.parametrize("path", [None, 3, True, 1.5, b"best.safetensors", ["best.safetensors"]])
def test_what_is_no_path(path):
    with pytest.raises(CheckpointError, match=r"a model is read from a path such as 'runs/best.safetensors', but got"):
        load_classifier(path)


def test_a_path_may_be_a_string(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no best\.safetensors"):
        load_classifier(str(tmp_path))


def test_a_name_too_long_for_a_file(tmp_path):
    long = tmp_path / ("9" * 400)
    for read in (read_header, load_classifier, lambda path: read_image(path, (4, 4), 3), find_weights, read_config):
        if read is not find_weights:
            with pytest.raises(AttnkitError):
                read(long)
    assert find_weights(long) == long


@pytest.mark.parametrize("text", ["[" * 200_000, '{"model": ' + "[" * 120 + "]" * 120 + "}", "\ud800", "7"])
def test_a_header_that_cannot_be_read(tmp_path, text):
    file = tmp_path / "best.safetensors"
    head = json.dumps({"__metadata__": {"attnkit": text}}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(CheckpointError, match=r"does not say which model it belongs to|is not a safetensors"):
        read_header(file)
    file.write_bytes(pack({"a": torch.ones(1)}, {}).replace(b"attnkit", b"another"))
    file.with_suffix(".json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="does not say which model it belongs to"):
        read_header(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preprocess": {**PREPROCESS, "img_size": [16.0, 16]}}, "img_size=(16.0, 16) is no height and width"),
        ({"preprocess": {**PREPROCESS, "img_size": [10**9, 1]}}, "is no height and width in pixels"),
        ({"preprocess": {**PREPROCESS, "channels": True}}, "channels=True is neither 1 nor 3"),
        ({"preprocess": {**PREPROCESS, "mean": [None]}}, "no finite numbers for 1 channels"),
        ({"preprocess": {**PREPROCESS, "std": [float("nan")]}}, "no finite numbers for 1 channels"),
        ({"preprocess": {**PREPROCESS, "std": [0]}}, "is not positive"),
        ({"preprocess": None}, "does not say how to use it"),
        ({"classes": "ab"}, "classes='ab' is no list of names"),
        ({"classes": [1, 2]}, "is no list of names"),
        ({"model": config(depth=2)}, "missing (blocks.1"),
        ({"model": config(depth=10**9)}, "must be <= 1000 blocks"),
        ({"model": config(stem=[{"kind": "conv_norm", "dim": 999_999, "kernel": 4, "stride": 4}])}, "of another shape"),
        ({"model": config(img_size=10**6)}, "of another shape (pos_embed"),
        (
            {"model": config(stem=[{"kind": "conv_norm", "dim": 64, "kernel": 2**30 - 1, "stride": 4}])},
            "cannot be built",
        ),
    ],
)
def test_a_header_that_asks_for_what_cannot_be(tmp_path, changes, said):
    file = checkpoint(tmp_path / "best.safetensors", **changes)
    with pytest.raises(AttnkitError, match=re.escape(said)):
        load_classifier(file)


def test_classes_that_the_model_does_not_have(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    classifier = load_classifier(checkpoint(tmp_path / "best.safetensors", classes=["a", "b", "c"]))
    with pytest.raises(CheckpointError, match=r"gives \(1, 2\) for one image, but its checkpoint names 3 classes"):
        classifier(tmp_path / "a.png")


def test_what_was_saved_of_the_preprocessing_comes_back():
    right = Preprocess((16, 24), 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocess.from_dict(json.loads(json.dumps(right.to_dict()))) == right


def test_weights_of_another_kind_of_numbers_are_refused_whole():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    for dtype in (torch.int64, torch.bool, torch.complex64):
        wrong = {"weight": torch.ones(2, 2), "bias": torch.ones(2).to(dtype)}
        with pytest.raises(CheckpointError, match=rf"1 of other numbers \(bias {dtype} instead of torch.float32\)"):
            load_weights(model, wrong, source="x")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    load_weights(model, {"weight": torch.ones(2, 2).half(), "bias": torch.ones(2).double()}, source="x")
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_a_dtype_that_pytorch_does_not_have(tmp_path):
    head = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(head)) + head + b"\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(file)


def state(path, change):
    """A training state in which something was changed, and another model with its optimizer."""
    models = [nn.Linear(3, 2) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    path.write_bytes(pack_state(models[0], optimizers[0], Progress()))
    tensors = read_weights(path)
    change(tensors)
    return models[1], optimizers[1], tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update({"optimizer/exp_avg/bias": torch.ones(3)}), "no part of this model's training"),
        (lambda found: found.update({"optimizer/exp_avg/other": torch.ones(2)}), "no part of this model's training"),
        (lambda found: found.update({"optimizer/exp_avg/bias": torch.ones(2).long()}), "no part of this model's"),
        (lambda found: found.update({"optimizer/step/bias": torch.ones(2)}), "no part of this model's training state"),
        (lambda found: found.update({"optimizer/exp/bias": torch.ones(2)}), "no part of this model's training state"),
        (lambda found: found.update({"else": torch.ones(2)}), "no part of this model's training state"),
        (lambda found: found.pop("optimizer/step/bias"), "lacks step of bias"),
        (lambda found: found.pop("model/bias"), "1 missing (bias)"),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused_whole(tmp_path, change, said):
    model, optimizer, tensors = state(tmp_path / "resume.safetensors", change)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        unpack_state(tmp_path / "resume.safetensors", model, optimizer, tensors)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": "1"},
        {"history": [3]},
        {"history": [{"epoch": 1}]},
        {"epoch": 7},
        {"identity": None},
        {"scaler": []},
        {"more": 1},
    ],
)
def test_progress_that_cannot_be(tmp_path, changes):
    right = {"kind": "resume", **vars(Progress(1, [{"epoch": 1, "val_accuracy": 0.5}]))}
    file = tmp_path / "resume.safetensors"
    file.write_bytes(pack({"a": torch.ones(1)}, right))
    assert read_progress(file).epoch == 1
    file.write_bytes(pack({"a": torch.ones(1)}, right | changes))
    with pytest.raises(CheckpointError, match="start anew with --overwrite"):
        read_progress(file)


@pytest.mark.parametrize("name", ["../other", "..", "/", "{}/other", "x/../../other"])
def test_a_run_whose_models_have_names_that_lead_out_of_it(tmp_path, name):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "best.safetensors").write_bytes(b"x")
    (run / "run.json").write_text(json.dumps({"models": {name.format(tmp_path): {}, "second": {}}}))
    identity = {"models": {"model": {}}, "options": {}, "data": {}, "processes": 1}
    RunFolder(run, ("model",)).open(identity, resume=False, overwrite=True, room=1)
    assert (other / "best.safetensors").exists() and not (run / "best.safetensors").exists()


def test_a_run_that_says_nothing_readable_about_itself(tmp_path):
    identity = {"models": {"model": {}}, "options": {}, "data": {}, "processes": 1}
    for text in ("[" * 200_000, "[]", "7", '{"models": 3}', '{"models": ["model"]}', '{"models": {}}', "\ud800"):
        (tmp_path / "run.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(CheckpointError, match=r"holds files of a run but no readable run.json"):
            RunFolder(tmp_path, ("model",)).open(identity, resume=True, overwrite=False, room=1)
        with pytest.raises(CheckpointError, match=r"holds no best\.safetensors"):
            find_weights(tmp_path)


def test_an_image_in_colours_that_nobody_converts(tmp_path):
    Image.new("LAB", (3, 3)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"image .*a\.tif cannot be read \(conversion from LAB to RGB not supported\)"):
        read_image(tmp_path / "a.tif", (4, 4), 1)
