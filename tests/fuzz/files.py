"""Checkpoint files of other people, in every format: damaged, lying about sizes, and pickles that want to run."""

from __future__ import annotations

import functools
import io
import pickle
import random
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors.torch import save
from torch import Tensor

from attnkit_models.checkpoints.files import read_checkpoint
from tests.fuzz.case import agree
from tests.fuzz.checkpoints import Payload
from tests.fuzz.mutation import PLAIN_ODDITIES, mutate_bytes, mutate_plain

FORMATS = ("archive", "archive", "pickle", "safetensors", "flax", "flax")
NAMES = ("weights.pth", "weights.pt", "checkpoint_300", "flax.msgpack", "model.safetensors", "model.bin", "a b ü")


def case(dice: random.Random, folder: Path) -> None:
    file, marker = folder / dice.choice(NAMES), folder / "executed"
    form = dice.choice(FORMATS)
    way = dice.randrange(6)
    content = intact(form)
    if way == 0:
        content = _with_payload(dice, marker)
    elif way == 1 and form == "flax":
        content = _flax(mutate_plain(_tree(), dice, PLAIN_ODDITIES, dice.randint(1, 3)))
    elif way in (1, 2):
        content = mutate_bytes(content, dice, dice.randint(1, 3))
    elif way == 3 and dice.random() < 0.5:
        content = dice.choice(
            (b"", b"<html>", b"version https://git-lfs", b"\x1f\x8b", b"\x81" * 9, b"PK\x03\x04", b"\x80\x02.")
        )
    file.write_bytes(content)
    try:
        found = read_checkpoint(file)
    finally:
        agree(not marker.exists(), "reading a checkpoint executed what stands in it")
    agree(isinstance(found, dict), "a checkpoint is no dict")
    if content == intact(form):
        names = found if form != "archive" else found["model"]
        right = _tensors()
        agree(names.keys() == right.keys(), "a file was read with other names than it holds")
        agree(all(torch.equal(names[name], right[name]) for name in right), "a file was read with other numbers")


@functools.cache
def intact(form: str) -> bytes:
    """A whole file of a format."""
    if form == "safetensors":
        return save(_tensors())
    if form == "flax":
        return _flax(_tree())
    file = io.BytesIO()
    if form == "archive":
        torch.save({"model": _tensors(), "epoch": 3}, file)
    else:
        torch.save(_tensors(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _tensors() -> dict[str, Tensor]:
    """A few names and tensors."""
    return {"block.weight": torch.arange(6.0).view(2, 3), "block.bias": torch.ones(2).half(), "norm": torch.zeros(())}


def _tree() -> dict[str, Any]:
    """The same as flax has it, arrays as lists of shape, dtype and bytes."""
    tree: dict[str, Any] = {}
    for name, tensor in _tensors().items():
        *path, last = name.split(".")
        inner = tree
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = {
            "array": [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.flatten().tolist()]
        }
    return {"target": 3, "params": {"params": tree}}


def _flax(tree: Any) -> bytes:
    """A tree as flax writes it, whatever became of its arrays."""
    try:
        return msgpack.packb(_packed(tree))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return b"\x81\xa1a" * 3_000


def _packed(node: Any) -> Any:
    if (
        isinstance(node, dict)
        and node.keys() == {"array"}
        and isinstance(node["array"], list)
        and len(node["array"]) == 3
    ):
        shape, dtype, numbers = node["array"]
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        known = isinstance(kind, torch.dtype)
        try:
            content = bytes(torch.tensor(numbers, dtype=kind if known else torch.float32).view(-1).view(torch.uint8))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            content = b"odd"
        name = dtype.encode(errors="replace") if isinstance(dtype, str) else dtype
        return msgpack.ExtType(1, msgpack.packb([shape, name, content]))
    if isinstance(node, dict):
        return {key: _packed(value) for key, value in node.items()}
    return [_packed(value) for value in node] if isinstance(node, list) else node


def _with_payload(dice: random.Random, marker: Path) -> bytes:
    held: Any = dice.choice((lambda: Payload(marker), lambda: {"model": _tensors(), "evil": Payload(marker)}))()
    if dice.random() < 0.3:
        return pickle.dumps(held, protocol=dice.randint(2, 5))
    file = io.BytesIO()
    torch.save(held, file, _use_new_zipfile_serialization=dice.random() < 0.7)
    return file.getvalue()
