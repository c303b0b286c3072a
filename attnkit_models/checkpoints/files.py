"""Checkpoint files of the papers' authors: PyTorch's, safetensors, and flax's msgpack. Nothing in them is executed."""

from __future__ import annotations

import argparse
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CheckpointError, load_extra, shown

# What files begin with that are often taken for checkpoints.
FOREIGN = {
    b"<": "a web page, which a failed download leaves",
    b"version https://git-lfs": "a pointer of Git LFS, without the file it stands for; run: git lfs pull",
    b"\x1f\x8b": "packed with gzip; unpack it first",
    b"\x89HDF": "an HDF5 file; convert it with what wrote it",
}
# Objects of training scripts that PyTorch may make from a pickle: this one only holds values.
HARMLESS: list[Any] = [argparse.Namespace]
# How flax marks an array that it cut into pieces, and the kinds of its own values.
CHUNKED = "__msgpack_chunked_array__"
NDARRAY, COMPLEX, SCALAR = 1, 2, 3
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}
# No list in a checkpoint of flax is long, and a short file could claim long ones.
LONGEST_LIST = 1024


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the file of a checkpoint, whatever its name ends in.

    Args:
        path: a file of PyTorch (`.pth`, `.pt`), of which nothing but tensors and plain values is read; a safetensors
            file; or one of flax (`checkpoint_300`, `.msgpack`), for which jax need not be installed.

    Returns:
        What the file holds, as `import_official` takes it: tensors on the CPU under the authors' names, in PyTorch's
        files possibly inside `"model"` or the like; of flax's tree the arrays of `params`, paths joined by dots.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, of another format, or holds anything else.
        MissingExtraError: for safetensors and flax, without the packages that read them.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is read from a path such as 'weights.pth', but got {shown(path)}")
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {_reason(error)}") from error
    if not start:
        raise CheckpointError(f"checkpoint {file} is an empty file (0 bytes)")
    for begin, what in FOREIGN.items():
        if start.lstrip().startswith(begin):
            raise CheckpointError(f"{file} is no checkpoint but {what}")
    try:
        if start.startswith(b"PK\x03\x04"):
            return _read_torch(file, archive=True)
        if start[8:9] == b"{" and start[7] == 0:
            return dict(load_extra("safetensors.torch", extra="checkpoints", purpose="reading it").load_file(file))
        if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return _read_torch(file, archive=False)
        if start[0] & 0xF0 == 0x80 or start[0] in (0xDE, 0xDF):
            return _read_flax(file.read_bytes())
    except (CheckpointError, ImportError):
        raise
    # A parser that meets a broken file raises whatever it ran into.
    except Exception as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {_reason(error)}") from error
    raise CheckpointError(f"{file} is no checkpoint of PyTorch, safetensors or flax; it begins with {start[:8]!r}")


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read_torch(file: Path, *, archive: bool) -> dict[str, Any]:
    if archive:
        with zipfile.ZipFile(file) as parts:
            claimed = sum(part.file_size for part in parts.infolist())
        if claimed > file.stat().st_size:
            raise ValueError(f"its {file.stat().st_size:,} bytes claim to hold {claimed:,}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = "Unsupported" in str(error) or "GLOBAL" in str(error)
        if not unsafe:
            raise
        name = str(error).partition("GLOBAL ")[2].split(" ")[0]
        raise CheckpointError(
            f"checkpoint {file} holds more than tensors and plain values{f' ({name})' if name else ''}, which would "
            f"have to be executed; save its state dict alone with what wrote it"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"checkpoint {file} holds no names and tensors, but {type(found).__name__}")
    return dict(found)


def _read_flax(content: bytes) -> dict[str, Any]:
    msgpack = load_extra("msgpack", extra="checkpoints", purpose="reading a checkpoint of flax")

    def extension(code: int, data: bytes) -> Any:
        if code in (NDARRAY, SCALAR):
            return _array(msgpack.unpackb(data, raw=True, max_array_len=LONGEST_LIST))
        if code == COMPLEX:
            return complex(*msgpack.unpackb(data, max_array_len=LONGEST_LIST))
        raise ValueError(f"a value of the unknown kind {code}")

    tree = msgpack.unpackb(content, ext_hook=extension, raw=False, max_array_len=LONGEST_LIST)
    while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
        tree = tree["params"]
    if not isinstance(tree, dict):
        raise ValueError(f"it holds {type(tree).__name__} instead of a tree of names")
    found = dict(_leaves(tree, ""))
    if not found:
        raise ValueError("it holds no arrays")
    return found


def _array(parts: Any) -> Tensor:
    """An array as flax writes it: its shape, the name of its dtype, and its bytes in row-major order."""
    if not isinstance(parts, list) or [type(one) for one in parts] != [list, bytes, bytes]:
        raise ValueError("an array is no list of shape, dtype and bytes")
    shape, name, content = parts
    kind = DTYPES.get(name.decode())
    if kind is None:
        raise ValueError(f"an array is of dtype {shown(name.decode())}, which PyTorch does not have")
    good = all(type(size) is int and size >= 0 for size in shape)
    if not good or math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"an array of {name.decode()} {shown(tuple(shape))} has {len(content)} bytes")
    if not content:
        return torch.zeros(shape, dtype=kind)
    numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8 if kind == torch.bool else kind)
    return (numbers != 0 if kind == torch.bool else numbers).view(shape)


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    """Names and arrays of a tree; numbers and strings between them are left out."""
    for name, value in tree.items():
        where = f"{path}{name}"
        if isinstance(value, Tensor):
            yield where, value
        elif isinstance(value, dict):
            if CHUNKED in value:
                yield where, _joined(value)
            else:
                yield from _leaves(value, f"{where}.")


def _joined(pieces: Mapping[str, Any]) -> Tensor:
    """An array from its pieces: `{"shape": {"0": ...}, "chunks": {"0": array, ...}}`."""
    shape, chunks = ([one[str(at)] for at in range(len(one))] for one in (pieces["shape"], pieces["chunks"]))
    return torch.cat([one.flatten() for one in chunks]).view(shape)
