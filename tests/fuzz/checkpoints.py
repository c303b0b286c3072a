"""Checkpoints and training states: cut short, flipped, hostile, of other models, and pickles that want to run."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import nn

import attnkit
from attnkit.errors import AttnkitError
from attnkit_models.train.checkpoint import load_weights, pack, read_weights
from attnkit_models.train.predict import load_classifier
from attnkit_models.train.resume import Progress, optimizer_tensors, pack_state, read_progress, unpack_state
from attnkit_models.train.rundir import RunFolder
from tests.fuzz.case import agree
from tests.fuzz.mutation import PLAIN_ODDITIES, any_of, misspelt, mutate_bytes, mutate_plain

CONFIG: dict[str, Any] = {
    "kind": "isotropic",
    "stem": [{"kind": "conv_norm", "dim": 8, "kernel": 4, "stride": 4}],
    "depth": 2,
    "mix": {
        "kind": "mix",
        "groups": [{"kind": "dense", "heads": 1}, {"kind": "random_window", "heads": 1, "window": 4}],
    },
    "num_classes": 3,
    "in_chans": 1,
    "img_size": [16, 16],
}
HEADER: dict[str, Any] = {
    "kind": "weights",
    "label": "model",
    "model": CONFIG,
    "classes": ["a", "b", "c"],
    "preprocess": {"img_size": [16, 16], "channels": 1, "mean": [0.5], "std": [0.25]},
}
IDENTITY: dict[str, Any] = {
    "models": {"model": CONFIG},
    "options": {"epochs": 3},
    "data": {"name": "digits"},
    "processes": 1,
    "versions": {},
}
# What a file format that can hold code is called.
NAMES = ("best.safetensors", "weights.pth", "weights.pt", "model.bin", "model.ckpt", "model.pkl")


def case(dice: random.Random, folder: Path) -> None:
    marker = folder / "executed"
    try:
        dice.choice(WAYS)(dice, folder)
    finally:
        agree(not marker.exists(), "reading a checkpoint executed what stands in it")


def _trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after one step, as a function of the seed."""
    torch.manual_seed(seed)
    model = attnkit.build(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 16, 16)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@functools.cache
def intact(kind: str) -> bytes:
    """An intact file."""
    model, optimizer = _trained(0)
    if kind == "weights":
        return pack(model.state_dict(), HEADER)
    record = {"epoch": 1, "val_accuracy": 0.5}
    return pack_state(model, optimizer, Progress(1, [record], IDENTITY))


def _mutated(dice: random.Random, content: bytes) -> bytes:
    """The file intact, damaged anywhere, or put together again from a header that lies."""
    way = dice.randrange(11)
    if way < 2 or way > 9:
        return content
    if way > 7:
        return _of_another_model(dice, content)
    if way == 2:
        return mutate_bytes(content, dice, dice.randint(1, 2))
    if way == 3:
        size = dice.choice((0, 1, 7, 8, 2**24, 2**31, 2**40, 2**62, 2**64 - 1, len(content), dice.randrange(4000)))
        return struct.pack("<Q", size) + content[8:]
    header, data = _split(content)
    tensors = [name for name in header if name != "__metadata__"]
    if way == 4:
        meta = json.loads(header["__metadata__"]["attnkit"])
        header["__metadata__"]["attnkit"] = _text(mutate_plain(meta, dice, PLAIN_ODDITIES, dice.randint(1, 2)), dice)
    elif way == 5:
        header = mutate_plain(header, dice, PLAIN_ODDITIES, dice.randint(1, 2))
    elif way == 6:
        entry = header[dice.choice(tensors)]
        what = dice.choice(list(entry))
        entry[what] = {
            "dtype": lambda: dice.choice(
                ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "F8_E8M0", "C64", "X9", 3)
            ),
            "shape": lambda: dice.choice(([], [2**62], [2**31, 2**31, 4], [-1], [0], list(reversed(entry["shape"])))),
            "data_offsets": lambda: dice.choice(([0, 2**62], [4, 0], [0, 4], [2**64 - 4, 2**64], [0], [-8, 8])),
        }[what]()
    else:
        name = dice.choice(tensors)
        other = dice.choice((misspelt(name, dice), dice.choice(tensors), "", "x" * 3000))
        header[other] = header.pop(name) if dice.random() < 0.7 else header[name]
    return _join(header, data, dice)


def _of_another_model(dice: random.Random, content: bytes) -> bytes:
    """A file that can be read, but of which some tensors do not fit."""
    meta, tensors = _split(content)[0]["__metadata__"], load(content)
    dtypes = (torch.float16, torch.float64, torch.int32)
    for name in dice.sample(list(tensors), dice.choice((1, 1, 2, len(tensors)))):
        tensor = tensors.pop(name)
        ways: tuple[Callable[[], dict[str, torch.Tensor]], ...] = (
            dict,
            lambda name=name, tensor=tensor: {f"{name}.x": tensor},
            lambda name=name, tensor=tensor: {name: tensor, misspelt(name, dice): tensor.clone()},
            lambda name=name, tensor=tensor: {name: tensor[None]},
            lambda name=name, tensor=tensor: {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor},
            lambda name=name, tensor=tensor: {name: tensor.to(dice.choice(dtypes))},
            lambda name=name, tensor=tensor: {name: tensor + (math.nan if tensor.is_floating_point() else 1)},
        )
        tensors |= dice.choice(ways)()
    return save(tensors, meta)


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join(header: Any, data: bytes, dice: random.Random) -> bytes:
    text = _text(header, dice).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + data


def _text(plain: Any, dice: random.Random) -> str:
    try:
        text = json.dumps(plain)
    except (TypeError, RecursionError):
        text = "[" * 100_000
    return dice.choice(("", "null", "[]", "{", "7", "[" * 100_000, '"x"')) if dice.random() < 0.08 else text


def _write(dice: random.Random, folder: Path, kind: str, name: str) -> tuple[Path, bytes]:
    file, content = folder / name, _mutated(dice, intact(kind))
    file.write_bytes(content)
    if dice.random() < 0.1:
        beside = dice.choice((b"", b"\xff\xfe", b"[" * 100_000, b"{}", json.dumps(HEADER).encode()))
        file.with_suffix(".json").write_bytes(beside)
    return file, content


def _predict(dice: random.Random, folder: Path) -> None:
    file, content = _write(dice, folder, "weights", "best.safetensors")
    if dice.random() < 0.2:
        (folder / "run.json").write_bytes(_mutated_json(dice, IDENTITY))
        file = folder
    classifier = load_classifier(file)
    image = folder / "image.png"
    Image.new("L", (20, 17), 99).save(image)
    found = classifier(image)
    agree(len(found) == min(3, len(classifier.classes)), "another number of classes than asked for")
    if content == intact("weights"):
        state, right = classifier.model.state_dict(), _trained(0)[0].state_dict()
        agree(_equal(state, right), "a loaded model differs from the saved one")


def _load(dice: random.Random, folder: Path) -> None:
    file, content = _write(dice, folder, "weights", "last.safetensors")
    model = _trained(1)[0]
    before = copy.deepcopy(model.state_dict())
    try:
        weights = read_weights(file)
        load_weights(model, weights, source=str(file))
    except BaseException:
        agree(_equal(model.state_dict(), before), "weights that were refused were loaded in part")
        raise
    after = model.state_dict()
    agree(all(_same(after[name], weights[name]) for name in after), "loaded weights differ from the file's")
    agree(content != intact("weights") or not _equal(after, before), "nothing was loaded")


def _resume(dice: random.Random, folder: Path) -> None:
    file, content = _write(dice, folder, "resume", "resume.safetensors")
    model, optimizer = _trained(1)
    before = copy.deepcopy((model.state_dict(), optimizer_tensors(model, optimizer)))
    progress = read_progress(file)
    agree(isinstance(progress.epoch, int) and all(isinstance(one, dict) for one in progress.history), "odd progress")
    agree(progress.best is None or isinstance(progress.best, dict), "an odd best epoch")
    try:
        unpack_state(file, model, optimizer, read_weights(file))
    except BaseException:
        after = (model.state_dict(), optimizer_tensors(model, optimizer))
        agree(all(map(_equal, after, before)), "a training state that was refused was loaded in part")
        raise
    if content == intact("resume"):
        right, others = _trained(0)
        agree(_equal(model.state_dict(), right.state_dict()), "a continued model differs from the saved one")
        moments = optimizer_tensors(right, others)
        agree(_equal(optimizer_tensors(model, optimizer), moments), "a continued optimizer differs from the saved one")
    model.zero_grad()
    model(torch.randn(2, 1, 16, 16)).square().sum().backward()
    optimizer.step()


def _run(dice: random.Random, folder: Path) -> None:
    run, other = folder / "run", folder / "other"
    for place in (run, other):
        place.mkdir()
    (other / "best.safetensors").write_bytes(b"somebody's")
    (other / "run.json").write_bytes(b"somebody's")
    _write(dice, run, "resume", "resume.safetensors")
    if dice.random() < 0.9:
        content = _mutated_json(dice, IDENTITY) if dice.random() < 0.7 else _leading_out(dice, other)
        (run / "run.json").write_bytes(content)
    before = _files(folder)
    opened = RunFolder(run, ("model",))
    overwrite = dice.random() < 0.3
    try:
        opened.open(IDENTITY, resume=not overwrite, overwrite=overwrite, room=1000)
    except AttnkitError:
        agree(_files(folder) == before, "a refused run was changed")
        raise
    finally:
        after = _files(folder)
        kept = [name for name in before if name.parts[0] != run.name]
        agree(all(after.get(name) == before[name] for name in kept), "files outside of the run's folder were changed")


def _leading_out(dice: random.Random, other: Path) -> bytes:
    """A run whose models have names that lead to another folder."""
    names = dice.sample(("../other", str(other), "..", ".", "", "/", "model", "\x00", "a" * 300, "x/../../other"), 2)
    return json.dumps({**IDENTITY, "models": dict.fromkeys(names, CONFIG)}).encode()


def _files(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _mutated_json(dice: random.Random, plain: Any) -> bytes:
    if dice.random() < 0.4:
        return json.dumps(plain).encode()
    if dice.random() < 0.5:
        return mutate_bytes(json.dumps(plain).encode(), dice, dice.randint(1, 2))
    return _text(mutate_plain(plain, dice, PLAIN_ODDITIES, dice.randint(1, 2)), dice).encode(errors="replace")


class Payload:
    """What a loader that unpickles would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _pickle(dice: random.Random, folder: Path) -> None:
    file = folder / dice.choice(NAMES)
    content: Any = {"state_dict": {"weight": torch.ones(2)}, "evil": Payload(folder / "executed")}
    if dice.random() < 0.5:
        torch.save(content, file, _use_new_zipfile_serialization=dice.random() < 0.7)
    else:
        file.write_bytes(pickle.dumps(content["evil"]))
    if dice.random() < 0.3:
        file.write_bytes(mutate_bytes(file.read_bytes(), dice))
    if dice.random() < 0.3:
        file.with_suffix(".json").write_text(json.dumps(HEADER))
    where = folder if dice.random() < 0.2 else file
    any_of(dice, (load_classifier, read_weights, read_progress))(where)


def _equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return found.keys() == right.keys() and all(_same(found[name], right[name]) for name in right)


def _same(found: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(found.nan_to_num(7e7), right.to(found.dtype).nan_to_num(7e7))


WAYS = (*[_predict] * 3, *[_load] * 2, *[_resume] * 2, _run, _pickle)
