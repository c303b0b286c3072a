"""Kernels of stencils compiled for GPUs that are not there: some of the table's lines; `make kernels` compiles all."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnkit.errors import BackendError
from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED
from attnkit.kernels.triton.stencil import sweep
from attnkit.kernels.triton.stencil.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    PATH,
    Config,
    configuration,
    spot_of,
)
from attnkit.kernels.triton.stencil.sweep import OWNED, Line
from attnkit.kernels.triton.sweeping import TRIFLE
from attnkit.kernels.triton.table import Table

ROOT = Path(__file__).parents[3]

# Of each class of devices the neighborhoods and learned queries of models, and what needs most registers.
LINES = [
    *(Line(device, "forward", "bfloat16", 7, 32, "tables") for device in DEVICE_CLASSES),
    *(Line(device, "learned_forward", "bfloat16", 7, 16, "tables") for device in DEVICE_CLASSES),
    *(Line(device, "learned_gradient", "bfloat16", 7, 16, "tables") for device in DEVICE_CLASSES),
    *(Line("sm_90", direction, "bfloat16", 7, 32, "everything") for direction in ("query_gradient", "key_gradient")),
    Line("sm_90", "forward", "bfloat16", 15, 32, "bare"),
    Line("sm_80", "learned_gradient", "float32", 7, 32, "everything"),
]

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from attnkit.kernels.triton.stencil import sweep
for words in json.loads(sys.stdin.read()):
    for one in sweep.needs(sweep.Line(*words)):
        print(json.dumps([words, one.launch.kernel.__name__, one.compiled, one.faults]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_nothing_spills_and_tensor_cores_multiply():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM]
    given = json.dumps(LINES)
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {Line(*words) for words, *_ in rows} == set(LINES)
    assert {f"{words}, {kernel}": faults for words, kernel, _, faults in rows if faults} == {}
    products = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for words, kernel, (registers, spilled, shared, instructions), _ in rows:
        line = Line(*words)
        assert 0 < registers <= (512 if line.device_class == "gfx942" else 255), line
        assert spilled <= TRIFLE and shared <= SHARED[line.device_class], line
        if kernel in ("stencil_forward", "stencil_query_gradient", "stencil_key_gradient"):
            assert products[line.device_class] in instructions, line


def test_lines_are_all_of_the_table():
    lines = sweep.lines()
    assert len(set(lines)) == len(lines) and set(LINES) <= set(lines)
    for device in DEVICE_CLASSES:
        for direction in DIRECTIONS:
            found = {(one.numbers, one.head_dim) for one in lines if one[:2] == (device, direction)}
            ways = 2 if direction in sweep.LEARNED else 3
            assert len(found) == ways * len(HEAD_DIMS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_kernels_of_a_direction_belong_to_a_line(direction):
    found = set()
    for kind in ("tables", "everything"):
        line = Line("sm_90", direction, "bfloat16", 7, 32, kind)
        found |= {launch.kernel.__name__ for launch in sweep.launches(line)}
    assert found == set(OWNED[direction])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_once_for_all_sizes(learned):
    from attnkit.kernels.triton import ahead
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import backward_of, forward_of

    found: dict[str, set[str]] = {}
    for side, batch in itertools.product((14, 28, 35, 56, 64, 70, 112), (1, 2, 3, 8)):
        q, k, v = torch.empty(batch, side**2, 3, 16, 32, device="meta", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        if learned:
            q = torch.empty(1, 1, 1, 1, device="meta").expand(batch, 16, 1, 1)
            k = torch.empty(batch, side**2, 16, 1, device="meta").transpose(1, 2)
        table = torch.empty(1, 16, 49, 1, 1, device="meta")
        windows = Windows(table, table, None, [side] * 2, 0, [7] * 2, [1] * 2, [1] * 2, False, 0.1)
        first = forward_of(q, k, v, windows, "sm_90")
        given = (torch.empty_like(first.out), None, first.out, first.total, first.peak, q, k, v, windows)
        back = backward_of(*given, [not learned, True, True, True, True], "sm_90")
        for launch in [first.launch, *back.launches]:
            source, _, options = ahead._source(launch, ahead.TARGETS["sm_90"])
            special = str((source.signature, source.constants, source.attrs, options))
            found.setdefault(launch.kernel.__name__, set()).add(special)
    assert len(found) == (4 if learned else 5)
    assert {name: len(ways) for name, ways in found.items()} == dict.fromkeys(found, 1)


def test_every_call_finds_a_configuration():
    shapes = itertools.product(
        DEVICE_CLASSES, DIRECTIONS, (1, 3, 7, 9, 31), (1, 8, 24, 200), (False, True), (False, True)
    )
    for device, direction, kernel, width, tables, tf32 in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            found = configuration(direction, kernel, width, dtype, device, tables, tf32)
            assert found.rows in (16, 32, 64, 128) and found.columns in (16, 32, 64, 128, 256)
            assert found.warps in (1, 2, 4, 8) and 1 <= found.stages <= 4
    with pytest.raises(BackendError, match="head dims 1 to 256, not 257"):
        configuration("forward", 7, 257, torch.float32, "sm_90")
    with pytest.raises(BackendError, match=r"16 and 32 bits, not torch\.float64"):
        configuration("forward", 7, 32, torch.float64, "sm_90")


def test_the_file_is_as_it_would_be_written():
    text, table = PATH.read_text(encoding="utf-8"), Table.of(PATH)
    assert table.written() == text
    spot, other = spot_of("forward", 7, 32, torch.bfloat16, True), Config(16, 128, 2, 3)
    assert spot == ("forward", "16 bit and tables", "7", "32")
    assert spot_of("learned_forward", 9, 8, torch.float32, True, True) == ("learned_forward", "32 bit", "15", "16")
    table.put("gfx942", spot, other)
    configuration.cache_clear()
    try:
        assert configuration("forward", 3, 17, torch.float16, "gfx942", True) == other
    finally:
        table.put("gfx942", spot, None)
        configuration.cache_clear()
    assert table.written() == text
