"""Checkpoint files as the authors' codes write them; damaged, foreign and hostile ones are one sentence."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import sys
import zipfile

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attnkit.errors import CheckpointError, MissingExtraError
from attnkit_models import import_official, read_checkpoint

STATE = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor([1, 2])}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].dtype == one.dtype and torch.equal(found[name], one), name


def array(shape, dtype, content, kind=1):
    """A value as flax writes it."""
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, content), use_bin_type=True))


def of_numpy(numbers, kind=1):
    numbers = np.asarray(numbers)
    return array(numbers.shape, numbers.dtype.name, numbers.tobytes(), kind)


def tree_of(state):
    """Names joined by dots as nested dicts of arrays."""
    tree = {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        inside = tree
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = of_numpy(tensor.numpy())
    return tree


@pytest.fixture
def written(tmp_path):
    """written(bytes) -> the path of a file that holds them."""

    def write(content, name="checkpoint"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model"])
def test_pytorch(tmp_path, archive, name):
    wrapped = {"model": STATE, "epoch": 3, "args": argparse.Namespace(lr=0.1), "scaler": {"scale": 2.0}}
    torch.save(wrapped, tmp_path / name, _use_new_zipfile_serialization=archive)
    found = read_checkpoint(tmp_path / name)
    same(found["model"], STATE)
    assert found["epoch"] == 3 and found["args"].lr == 0.1


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.bin", metadata={"format": "pt"})
    same(read_checkpoint(str(tmp_path / "model.bin")), STATE)


def test_flax(written, golden):
    """A training state of flax, as QnA's authors kept it, goes into the model."""
    one = golden("qna/qna_vit_micro")
    moments = {"0": {"count": of_numpy(np.int32(7)), "mu": {"params": tree_of({"x.y": torch.ones(2)})}}}
    state = {"step": 300, "params": tree_of(one.state), "opt_state": moments, "batch_stats": None}
    found = read_checkpoint(written(msgpack.packb(state, strict_types=True), "checkpoint_300"))
    same(found, one.state)
    model = import_official("qna_vit", found, one.hparams)
    one.check(model(one.tensors["input"].permute(0, 3, 1, 2)), "output")


def test_every_kind_of_value_of_flax(written):
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    brain = torch.randn(3).bfloat16()
    pieces = {str(at): of_numpy(one) for at, one in enumerate(np.split(numbers.ravel(), [9, 10]))}
    tree = {
        "cut": {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3, "2": 4}, "chunks": pieces},
        "brain": array((3,), "bfloat16", bytes(brain.view(torch.uint8).tolist())),
        "scalar": of_numpy(np.float64(0.5), kind=3),
        "empty": of_numpy(np.zeros((0, 3), dtype=np.int8)),
        "flags": of_numpy(np.array([True, False])),
        "deep": {"er": of_numpy(np.array([1, 2], dtype=np.uint16))},
        "complex": msgpack.ExtType(2, msgpack.packb((1.0, 2.0))),
        "text": "left out",
    }
    found = read_checkpoint(written(msgpack.packb({"params": {"params": tree}})))
    expected = {
        "cut": torch.from_numpy(numbers),
        "brain": brain,
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3, dtype=torch.int8),
        "flags": torch.tensor([True, False]),
        "deep.er": torch.tensor([1, 2], dtype=torch.uint16),
    }
    same(found, expected)


class Malicious:
    """What unpickles to a call of the system."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_executed(tmp_path, archive):
    torch.save(
        {"model": STATE, "x": Malicious(tmp_path / "ran")}, tmp_path / "a", _use_new_zipfile_serialization=archive
    )
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain values \(\w+\.mkdir\)"):
        read_checkpoint(tmp_path / "a")
    (tmp_path / "b").write_bytes(pickle.dumps({"x": Malicious(tmp_path / "ran")}))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "b")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"\(torch.nn.modules.linear.Linear\), which would have to be executed"):
        read_checkpoint(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_truncated_files(tmp_path, written):
    torch.save(STATE, tmp_path / "zip")
    torch.save(STATE, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "safe")
    (tmp_path / "flax").write_bytes(msgpack.packb({"params": tree_of(STATE)}))
    for name in ("zip", "old", "safe", "flax"):
        content = (tmp_path / name).read_bytes()
        for length in (0, 1, 7, 9, len(content) // 3, len(content) // 2, len(content) - 1):
            with pytest.raises(CheckpointError) as caught:
                read_checkpoint(written(content[:length]))
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is an empty file"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "is no checkpoint but a web page, which a failed download"),
        (b"\n\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\x1f\x8b\x08", "packed with gzip"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"hello, world", "is no checkpoint of PyTorch, safetensors or flax; it begins with b'hello, w'"),
        (msgpack.packb({"step": 3}), "it holds no arrays"),
        (msgpack.packb({"params": {}}), "it holds no arrays"),
        (msgpack.packb({"a": msgpack.ExtType(9, b"")}), "a value of the unknown kind 9"),
        (msgpack.packb({"a": array((2,), "float32", b"1234")}), r"an array of float32 \(2,\) has 4 bytes"),
        (msgpack.packb({"a": array((-1, -1), "int32", b"1234")}), r"an array of int32 \(-1, -1\) has 4 bytes"),
        (msgpack.packb({"a": array((1,), "object", b"12345678")}), "is of dtype 'object', which PyTorch does not have"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(3))}), "is no list of shape, dtype and bytes"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\xdd\xff\xff\xff\xff")}), "cannot be read"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "cannot be read"),
        (msgpack.packb({"a": [0] * 5000}), "cannot be read"),
        (msgpack.packb({3: 4}), "cannot be read"),
        (b"\x81\xa1a" * 900 + b"\x01", "cannot be read"),
        (b"\x81\xa1a" * 100_000, "cannot be read"),
        (struct.pack("<Q", 2**40) + b"{}", "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoints(written, content, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(written(content))
    assert "\n" not in str(caught.value)


def test_archives_that_claim_more_than_they_hold(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"0" * 10_000_000)
    with pytest.raises(CheckpointError, match=r"its [\d,]+ bytes claim to hold 10,000,000"):
        read_checkpoint(tmp_path / "bomb")


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint .*nowhere cannot be read: No such file or directory"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(CheckpointError, match="holds no names and tensors, but list"):
        read_checkpoint(tmp_path / "list")


@pytest.mark.parametrize("path", [None, 3, b"weights.pth", ["weights.pth"]])
def test_what_is_no_path(path):
    with pytest.raises(CheckpointError, match=r"a checkpoint is read from a path such as 'weights.pth', but got"):
        read_checkpoint(path)


def test_the_package_that_is_missing_is_named(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(MissingExtraError, match=r"needs msgpack.*; run: pip install 'attnkit\[checkpoints\]'"):
        read_checkpoint(written(b"\x80"))
