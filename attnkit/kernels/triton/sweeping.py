"""Sweeping: what the sweeps of all families of kernels share, and which families there are.

A family is a folder beside this file with a module `sweep`, which lists what its table of configurations can start and
compiles it for GPUs that are not there. `docs/generate/kernels.py` shows every family that is here, and the tests hold
it to its kernels. None of it imports Triton before something is compiled.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import torch

from attnkit.kernels.triton.devices import SHARED
from attnkit.kernels.triton.launch import Launch

if TYPE_CHECKING:
    from attnkit.kernels.triton.ahead import Compiled

# How numbers are multiplied: those of 16 bits, and float32 exactly or, where PyTorch is allowed to, as tf32.
Numbers: TypeAlias = Literal["bfloat16", "float16", "float32", "tf32"]

# NVIDIA's assembler puts a few bytes aside although registers are left, where that lets one more program run at a time.
TRIFLE, MOST_REGISTERS = 16, 255
# Rows from which a group of four warps multiplies, by the instruction it has for that.
WIDE = {"sm_90": (64, "wgmma"), "sm_100": (64, "tcgen05")}
FOLDER = Path(__file__).parent


class Needs(NamedTuple):
    """What a kernel of a line needs, and what is wrong with that."""

    launch: Launch
    compiled: Compiled
    faults: tuple[str, ...]


class Family(Protocol):
    """The module `sweep` of a family. Its lines are named tuples of words, numbers and bools, one for a kind of calls.

    Attributes:
        TITLE: the heading of its part of the page on kernels.
        TABLES: its tables, one a class of devices and direction: from the direction's word in names to the heading.
        ROWS: headings of the columns that say what a row of a table is for.
        COLUMNS: the other columns: from their word in names to the heading.
    """

    TITLE: str
    TABLES: Mapping[str, str]
    ROWS: Sequence[str]
    COLUMNS: Mapping[str, str]

    def lines(self) -> list[Any]:
        """All that the table of configurations can start, in the order of the page."""
        ...

    def name(self, line: Any) -> str:
        """The cell a line belongs to: class of devices, word of the table, a word for each of ROWS, word of the column,
        such as `"sm_90/forward/bfloat16/32/64"`. Kinds of calls that share a configuration share a cell."""
        ...

    def cut(self, line: Any) -> str:
        """The configuration of its cell, as the page shows it."""
        ...

    def needs(self, line: Any) -> list[Needs]:
        """Compiles the kernels of a line, see `needs_of`."""
        ...

    def fingerprint(self) -> str:
        """A number that changes with the kernels and the table, see `fingerprint_of`."""
        ...


def families() -> dict[str, Family]:
    """The families of kernels by the name of their folder."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/sweep.py"))
    return {name: importlib.import_module(f"{__package__}.{name}.sweep") for name in names}  # type: ignore[misc]


def needs_of(device_class: str, launches: Iterable[tuple[Launch, int]]) -> list[Needs]:
    """Compiles launches, made from tensors on the meta device, and tells what is wrong with them.

    Args:
        device_class: one of `DEVICE_CLASSES`.
        launches: each with the rows of the results that tensor cores are to multiply for it, 0 where they are not.
    """
    from attnkit.kernels.triton.ahead import compiled

    found = []
    for launch, rows in launches:
        one = compiled(launch, device_class)
        found.append(Needs(launch, one, tuple(faults(device_class, launch.warps, rows, one))))
    return found


def faults(device_class: str, warps: int, rows: int, found: Compiled) -> Iterator[str]:
    """What is wrong with a kernel: registers that spill, too much shared memory, products without tensor cores.

    Args:
        device_class: the GPUs it was compiled for.
        warps: warps of a program.
        rows: of a result that tensor cores are to multiply, 0 for none.
        found: what it needs.
    """
    if found.spilled > TRIFLE or (found.spilled and found.registers >= MOST_REGISTERS):
        yield f"{found.spilled} bytes of a thread do not fit into registers"
    limit = SHARED[device_class]
    if found.shared > limit:
        yield f"{found.shared} bytes of shared memory where there are {limit}"
    if not rows:
        return
    least, wanted = WIDE.get(device_class, (0, ""))
    if wanted and rows >= least and warps >= 4 and wanted not in found.instructions:
        yield f"tiles of {rows} rows do without {wanted}"
    if not found.instructions:
        yield "it does without tensor cores"


def fingerprint_of(folder: Path, table: Path) -> str:
    """A number that changes with a family's kernels, how they are started, what they share with other families, and
    their table, but not with comments and docstrings.

    Args:
        folder: of the family.
        table: its configurations.
    """
    digest = hashlib.sha256(table.read_bytes())
    # How a kernel is started, and what kernels of several families call.
    shared = [
        path
        for path in FOLDER.glob("*.py")
        if path.name == "launch.py" or "\n@triton.jit" in path.read_text(encoding="utf-8")
    ]
    for path in sorted([*folder.glob("*.py"), *shared]):
        # What compiles kernels, and what registers the operator, starts none.
        if path.name not in ("sweep.py", "op.py"):
            digest.update(ast.dump(_without_docstrings(ast.parse(path.read_text(encoding="utf-8")))).encode())
    return digest.hexdigest()[:16]


def dtype_of(numbers: Numbers) -> torch.dtype:
    """The dtype of tensors whose numbers are multiplied in some way."""
    return torch.float32 if numbers == "tf32" else getattr(torch, numbers)


@contextmanager
def multiplying(numbers: Numbers) -> Iterator[None]:
    """Sets PyTorch's own rule for products of float32 while launches are made."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if numbers == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
