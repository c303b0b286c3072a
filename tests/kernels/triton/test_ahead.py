"""Kernels compiled for GPUs that are not there: some of the table's lines; `make kernels` compiles all of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnkit.kernels.triton import sweeping
from attnkit.kernels.triton.blocks import sweep
from attnkit.kernels.triton.blocks.configs import DIRECTIONS, HEAD_DIMS, REGION_SIZES
from attnkit.kernels.triton.blocks.sweep import Line
from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED

ROOT = Path(__file__).parents[3]

# Of each class of devices the windows and regions of the models, and what needs most registers or shared memory.
LINES = [
    *(
        Line(device, direction, "bfloat16", 64, 32, kind, False)
        for device in DEVICE_CLASSES
        for direction in DIRECTIONS
        for kind in (("whole", "ragged") if device == "sm_90" else ("ragged",))
    ),
    *(Line(device, "window_gradient", "bfloat16", 64, 32, "windows", False) for device in DEVICE_CLASSES),
    *(Line(device, "window_gradient", "bfloat16", 64, 32, "ragged", True) for device in DEVICE_CLASSES),
    *(Line(device, "forward", "bfloat16", 128, 64, "whole", False) for device in DEVICE_CLASSES),
    Line("sm_90", "forward", "bfloat16", 16, 32, "whole", False),
    Line("sm_90", "forward", "bfloat16", 64, 32, "windows", True),
    Line("sm_90", "forward", "bfloat16", 128, 256, "whole", False),
    Line("sm_90", "forward", "bfloat16", 64, 32, "ragged", True),
    Line("sm_90", "query_gradient", "bfloat16", 64, 32, "ragged", True),
    Line("sm_80", "key_gradient", "bfloat16", 64, 128, "whole", False),
    # Wide heads need all shared memory of the small GPUs of that class.
    Line("sm_80", "query_gradient", "bfloat16", 64, 128, "prefix", False),
    Line("sm_80", "query_gradient", "bfloat16", 64, 256, "ragged", False),
    Line("sm_80", "query_gradient", "tf32", 64, 256, "prefix", False),
    Line("sm_80", "key_gradient", "tf32", 64, 256, "whole", False),
    # Products that are made a few channels at a time.
    Line("sm_80", "query_gradient", "float32", 64, 256, "prefix", True),
    Line("sm_90", "query_gradient", "float32", 64, 64, "ragged", True),
    Line("sm_80", "key_gradient", "tf32", 64, 256, "ragged", True),
    Line("sm_90", "forward", "tf32", 64, 32, "prefix", False),
    Line("sm_80", "forward", "float32", 64, 32, "prefix", False),
    Line("sm_80", "window_gradient", "float32", 16, 16, "ragged", True),
]
HALVES = [
    Line("sm_90", "forward", "float16", 64, 32, "whole", False),
    Line("sm_90", "key_gradient", "float16", 64, 32, "ragged", True),
    Line("sm_90", "window_gradient", "float16", 64, 32, "ragged", True),
]

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from attnkit.kernels.triton.blocks import sweep
for words in json.loads(sys.stdin.read()):
    for one in sweep.needs(sweep.Line(*words)):
        print(json.dumps([words, one.launch.kernel.__name__, one.compiled, one.faults]), flush=True)
"""


# Triton is for Linux; elsewhere there is nothing that compiles.
compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def found() -> dict[tuple[Line, str], tuple[list, list[str]]]:
    """What every kernel of the lines needs, and what is wrong with it; compiled by a process of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([*LINES, *HALVES, *(line._replace(numbers="bfloat16") for line in HALVES)]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = map(json.loads, done.stdout.splitlines())
    return {(Line(*words), kernel): (needs, faults) for words, kernel, needs, faults in rows}


@pytest.mark.slow
@compiles
def test_nothing_spills_and_everything_fits(found):
    assert {line for line, _ in found} >= {*LINES, *HALVES}
    assert {f"{line}, {kernel}": faults for (line, kernel), (_, faults) in found.items() if faults} == {}
    for (line, _), ((registers, spilled, shared, _), _) in found.items():
        assert 0 < registers <= (512 if line.device_class == "gfx942" else sweeping.MOST_REGISTERS)
        assert spilled <= sweeping.TRIFLE
        assert shared <= SHARED[line.device_class]


@pytest.mark.slow
@compiles
def test_tensor_cores_multiply(found):
    wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for device, instruction in wanted.items():
        for direction in (*DIRECTIONS, "window_gradient"):
            line = Line(device, direction, "bfloat16", 64, 32, "ragged", direction == "window_gradient")
            assert instruction in found[line, f"blocks_{direction}"][0][3], line
    # Fewer rows than a warp group has, and float32 that is not to be rounded.
    assert found[Line("sm_90", "forward", "bfloat16", 16, 32, "whole", False), "blocks_forward"][0][3] == ["mma"]
    assert found[Line("sm_80", "forward", "float32", 64, 32, "prefix", False), "blocks_forward"][0][3] == []
    assert found[Line("sm_90", "forward", "tf32", 64, 32, "prefix", False), "blocks_forward"][0][3] == ["wgmma"]


@pytest.mark.slow
@compiles
def test_half_precisions_need_the_same(found):
    halves = {key: needs for key, needs in found.items() if key[0] in HALVES}
    assert len(halves) == 1 + 1 + 1
    for (line, kernel), needs in halves.items():
        assert needs == found[line._replace(numbers="bfloat16"), kernel]


def test_lines_are_all_of_the_table():
    lines = sweep.lines()
    assert len(set(lines)) == len(lines)
    assert set(LINES) <= set(lines)
    cells = len(DEVICE_CLASSES) * len(sweep.NUMBERS) * 2 * len(REGION_SIZES) * len(HEAD_DIMS)
    for direction in DIRECTIONS:
        own = [line for line in lines if line.direction == direction]
        assert len({sweep.name(line) for line in own}) == cells
        assert sum(line.kind == "ragged" for line in own) == cells
        for line in own:
            if (line.numbers == "bfloat16" and not line.bias) or line.tile == sweep.ONE_TILE:
                assert line._replace(kind="whole") in lines or line._replace(kind="prefix") in lines


@compiles
def test_every_line_has_the_kernel_of_its_direction():
    """And is compiled with the branches that its kind is there for."""
    kernels, branches = set(), set()
    for line in sweep.lines(("sm_90",), ("bfloat16", "float32")):
        launches = {launch.kernel.__name__: launch for launch in sweep.launches(line)}
        assert f"blocks_{line.direction}" in launches, line
        kernels |= {*launches}
        for kernel, launch in launches.items():
            inside, words = launch.constants, {**launch.arguments, **launch.constants}
            flags = tuple(inside.get(name) for name in ("GAPS", "DIRECT", "PREFIX", "KEY_GAPS"))
            given = tuple(words.get(name) is not None for name in ("index", "entry", "key_mask", "bias", "grad_total"))
            branches.add((kernel, flags, given, inside["WIDTH"] != inside["BLOCK_D"]))
    assert kernels == {name for names in sweep.KERNELS.values() for name in names}
    walks = [(flags, given) for kernel, flags, given, _ in branches if kernel == "blocks_forward"]
    # Whole tiles with an index, without, and beside a prefix; lists of keys with an index and without.
    for direct, prefix, index in (
        (True, False, True),
        (True, False, False),
        (True, True, True),
        (False, True, True),
        (False, False, False),
    ):
        assert any((flags[1:3], given[0]) == ((direct, prefix), index) for flags, given in walks)
    for name in ("blocks_forward", "blocks_query_gradient", "blocks_key_gradient", "blocks_window_gradient"):
        assert {narrow for kernel, _, _, narrow in branches if kernel == name} == {False, True}


def test_the_fingerprint_is_of_code_alone(tmp_path, monkeypatch):
    source = "import triton\n\n\n@triton.jit\ndef kernel(x):\n    {}\n    return x + {}\n"
    paths = [tmp_path / "sweep.py", tmp_path / "kernel.py"]

    def fingerprint(docstring: str, number: int) -> str:
        paths[1].write_text(source.format(f'"""{docstring}"""', number), encoding="utf-8")
        return sweep.fingerprint()

    monkeypatch.setattr(sweep, "__file__", str(paths[0]))
    monkeypatch.setattr(sweeping, "FOLDER", tmp_path)
    assert fingerprint("One.", 1) == fingerprint("Another.", 1) != fingerprint("One.", 2)
    before = sweep.fingerprint()
    monkeypatch.setattr(sweep, "PATH", tmp_path / "configs.json")
    (tmp_path / "configs.json").write_text("{}", encoding="utf-8")
    assert sweep.fingerprint() != before
    # How kernels are started counts, what only lists lines does not.
    before = sweep.fingerprint()
    (tmp_path / "sweep.py").write_text("LINES = 1", encoding="utf-8")
    assert sweep.fingerprint() == before
    (tmp_path / "launch.py").write_text("WARPS = 4", encoding="utf-8")
    assert sweep.fingerprint() != before


def test_making_lines_leaves_the_precision_alone():
    before = torch.backends.cuda.matmul.fp32_precision
    with sweeping.multiplying("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
