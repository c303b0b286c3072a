"""Ahead-of-time compilation: machine code of a launch for a GPU that is not there, and what it needs of that GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from attnkit.errors import BackendError
from attnkit.kernels.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What multiplies matrices, by its name in the assembly. NVIDIA's machine code calls the first two HMMA and HGMMA.
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
}


class Compiled(NamedTuple):
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared: bytes of shared memory of a program.
        instructions: those of `INSTRUCTIONS` that stand in it.
    """

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]


def compiled(launch: Launch, device_class: str) -> Compiled:
    """Compiles a launch for a class of devices.

    Args:
        launch: made from tensors on the meta device, which count as aligned to 16 bytes, as PyTorch allocates them.
        device_class: one of `TARGETS`.

    Raises:
        BackendError: where Triton was started with TRITON_INTERPRET, which leaves nothing to compile.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise BackendError(f"{launch.kernel.__name__} is interpreted; unset TRITON_INTERPRET to compile it")
    found = triton.compile(*_source(launch, TARGETS[device_class]))
    text = found.asm["amdgcn" if "amdgcn" in found.asm else "ptx"]
    assert isinstance(text, str)
    registers, spilled = _amd_usage(text) if "hsaco" in found.asm else _nvidia_usage(found.asm["cubin"])
    named = tuple(name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, text))
    return Compiled(registers, spilled, found.metadata.shared, named)


def _source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What `triton.compile` takes, specialised by the code that specialises at run time: which arguments are multiples
    of 16, which are 1 and become constants, how wide integers are."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.given)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.given, bound, specialization, None)
    return ASTSource(kernel, signature, constants, attributes), target, options.__dict__


def _nvidia_usage(code: bytes | str) -> tuple[int, int]:
    """Registers, and bytes of stack, of the one kernel in a cubin."""
    assert isinstance(code, bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _amd_usage(text: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory, of the one kernel in an AMD assembly."""
    found = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    return found["vgpr_count"], found["private_segment_fixed_size"]
