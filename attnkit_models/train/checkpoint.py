"""Weights on disk: safetensors that name their own model, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

import attnkit
from attnkit.errors import CheckpointError
from attnkit_models.train.paths import is_file
from attnkit_models.train.plaindata import parse_json

HEADER = "attnkit"


def write_atomically(path: Path, content: bytes, *, instead: str = "choose another --out") -> None:
    """Writes a file so that at every moment either the old or the new content stands under its name.

    Args:
        path: the file.
        content: all of it.
        instead: what to do where it cannot be written, for messages.

    Raises:
        CheckpointError: if the disk is full or read-only; what stood there before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {explain(error, len(content), instead)}") from error


def explain(error: OSError, size: int = 0, instead: str = "choose another --out") -> str:
    """The system's reason for a failed write, and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = f"free at least {max(size / 1e6, 0.1):.1f} MB there" if size else "make room there"
        return f"{reason}; {room} and go on with --resume"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{reason}; {instead} or make that folder writable"
    return f"{reason}; {instead}"


def _sync_folder(folder: Path) -> None:
    """A rename lasts through a power cut only when its folder reached the disk too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, plain: Any) -> None:
    """Writes indented JSON, atomically."""
    write_atomically(path, (json.dumps(plain, indent=2) + "\n").encode())


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """A safetensors file as bytes, with `header` as JSON in its metadata."""
    # Copies, because views that share memory cannot be stored and training goes on meanwhile.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return pack_tensors(copies, metadata={HEADER: json.dumps(header)})


def read_header(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        CheckpointError: if there is no such file, or it is no checkpoint that attnkit wrote.
    """
    if not is_file(path):
        raise CheckpointError(
            f"there is no checkpoint {path}; pass a .safetensors file or a folder that attnkit train wrote"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors checkpoint: {_reason(error)}") from error
    beside = path.with_suffix(".json")
    try:
        text = metadata.get(HEADER) or (beside.read_text(encoding="utf-8") if beside.is_file() else "")
        header = parse_json(text)
    except (OSError, ValueError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} does not say which model it belongs to (no {HEADER!r} metadata, no {beside.name} "
            "beside it); pass a checkpoint that attnkit train wrote"
        )
    return header


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}") from error
    return unpack(content, source=str(path))


def unpack(content: bytes, *, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file's content, on the CPU.

    Raises:
        CheckpointError: if the content is damaged, or of a dtype that this PyTorch does not have.
    """
    try:
        return read_tensors(content)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {source} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """A library's own words in one line, without the whole of what it was given."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Makes sure that weights fit a model, which may be on the device "meta".

    Args:
        model: the model.
        weights: what should be its state dict.
        source: where the weights come from, for messages.

    Raises:
        CheckpointError: if names, shapes or kinds of numbers differ, with the first few of each.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    # Of another precision they may be, but no integers for floats.
    dtypes = [
        f"{name} {weights[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in weights and _number(weights[name]) != _number(own[name])
    ]
    found_by_kind = (
        ("missing", missing),
        ("unknown", extra),
        ("of another shape", shapes),
        ("of other numbers", dtypes),
    )
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in found_by_kind
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{source} holds the weights of another model than {type(model).__name__}: "
            f"of its {len(own)} tensors " + ", ".join(problems)
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Puts weights into a model, all of them or none; arguments and errors as in `check_weights`."""
    check_weights(model, weights, source=source)
    model.load_state_dict(dict(weights))


def _number(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def versions() -> dict[str, str]:
    """What made a checkpoint."""
    return {
        "attnkit": attnkit.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }
