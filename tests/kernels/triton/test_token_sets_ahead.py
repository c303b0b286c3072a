"""Kernels of token sets compiled for GPUs that are not there, their table, and launches that look at no value."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit.errors import BackendError
from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton import sweeping
from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED
from attnkit.kernels.triton.launch import Launch
from attnkit.kernels.triton.table import Table
from attnkit.kernels.triton.token_sets import configs, sweep
from attnkit.kernels.triton.token_sets.configs import DIRECTIONS, HEAD_DIMS, NUMBERS, PATH
from attnkit.kernels.triton.token_sets.sweep import Line

ROOT = Path(__file__).parents[3]

# Of each class of devices a model's heads, and what needs most registers or shared memory.
LINES = [
    *(Line(device, direction, "bfloat16", 64, True, False) for device in DEVICE_CLASSES for direction in DIRECTIONS),
    *(Line(device, "lists", "bfloat16", 16, True, False) for device in DEVICE_CLASSES),
    Line("sm_90", "lists", "bfloat16", 16, False, False),
    Line("sm_90", "forward", "bfloat16", 32, False, True),
    Line("sm_90", "query_gradient", "bfloat16", 64, True, True),
    Line("sm_80", "key_gradient", "bfloat16", 128, True, True),
    Line("sm_80", "query_gradient", "float32", 256, True, False),
    Line("sm_90", "forward", "tf32", 64, True, False),
]
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from attnkit.kernels.triton.token_sets import sweep
for words in json.loads(sys.stdin.read()):
    for one in sweep.needs(sweep.Line(*words)):
        print(json.dumps([words, one.launch.kernel.__name__, one.compiled, one.faults]), flush=True)
"""

# Triton is for Linux; elsewhere there is nothing that compiles.
compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@compiles
def test_nothing_spills_and_tensor_cores_multiply():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command, given = [sys.executable, "-c", PROGRAM], json.dumps(LINES)
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [(Line(*words), *rest) for words, *rest in map(json.loads, done.stdout.splitlines())]
    assert {line for line, *_ in rows} == set(LINES)
    wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for line, kernel, (registers, spilled, shared, instructions), faults in rows:
        assert not faults, (line, kernel)
        assert 0 < registers <= (512 if line.device_class == "gfx942" else sweeping.MOST_REGISTERS)
        assert spilled <= sweeping.TRIFLE and shared <= SHARED[line.device_class]
        if line.direction in DIRECTIONS and line.numbers == "bfloat16":
            assert wanted[line.device_class] in instructions, (line, kernel)


@compiles
def test_every_line_has_its_kernels():
    kernels, unions = set(), set()
    for line in sweep.lines(("sm_90",)):
        launches = sweep.launches(line)
        kernels |= {launch.kernel.__name__ for launch in launches}
        unions |= {launch.constants["TURNED"] for launch in launches if launch.kernel.__name__ == "token_set_unions"}
        if line.direction in DIRECTIONS:
            config = configs.configuration(
                line.direction,
                line.head_dim,
                sweeping.dtype_of(line.numbers),
                "sm_90",
                line.bias,
                line.numbers == "tf32",
            )
            assert launches[0].constants["BLOCK_M"] == config.rows
            assert launches[0].kernel.__name__ == f"token_sets_{line.direction}"
    assert kernels == set(itertools.chain(*sweep.KERNELS.values()))
    assert unions == {False, True}


def test_every_call_finds_a_configuration():
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for device, direction, width, dtype in itertools.product(DEVICE_CLASSES, DIRECTIONS, (1, 16, 24, 200, 256), dtypes):
        for bias, tf32 in itertools.product((False, True), repeat=2):
            found = configs.configuration(direction, width, dtype, device, bias, tf32)
            # A word has a bit for each row.
            assert found.rows in (16, 32, 64)
            assert found.columns in (16, 32, 64) and found.warps in (1, 2, 4, 8) and 1 <= found.stages <= 4
    with pytest.raises(BackendError, match="head dims 1 to 256, not 257"):
        configs.configuration("forward", 257, torch.float32, "sm_90")
    with pytest.raises(BackendError, match=r"16 and 32 bits, not torch\.float64"):
        configs.configuration("forward", 16, torch.float64, "sm_90")


def test_the_table_has_known_names_only_and_is_as_it_would_be_written():
    table = json.loads(PATH.read_text(encoding="utf-8"))
    assert set(table) <= {"default", *DEVICE_CLASSES}
    for directions in table.values():
        assert set(directions) <= set(DIRECTIONS)
        for numbers in directions.values():
            assert set(numbers) <= set(NUMBERS)
            assert all(set(widths) <= set(map(str, HEAD_DIMS)) for widths in numbers.values())
    assert Table.of(PATH).written() == PATH.read_text(encoding="utf-8")


@compiles
@pytest.mark.parametrize(
    ("bias", "order", "kept"),
    [
        (None, (2, 3), True),
        ((2, 3, 64, 64), (2, 3), True),
        ((1, 3, 64, 64), (1, 3), True),
        ((1, 3, 64, 64), (2, 1), False),
        ((2, 1, 64, 64), (1, 3), False),
        ((1, 1, 64, 64), (1, 1), True),
        ((1, 1, 64, 64), (2, 3), False),
        # Added up by queries or keys, of one item and head.
        ((1, 1, 64, 1), (2, 3), True),
        ((1, 1, 1, 64), (2, 3), True),
    ],
)
def test_a_bias_of_pairs_is_added_up_in_one_order(bias, order, kept):
    """Else a program that goes over the items and heads that share it would find another's queries in some of them."""
    from attnkit.kernels.triton.token_sets.launches import backward_of, forward_of

    made = functools.partial(torch.empty, device="meta")
    q = made(2, 3, 64, 16)
    table, given = made(2, 3, 64, 64, dtype=torch.bool), None if bias is None else made(bias)
    tables = SetTables(table, None, given, 0, 0, 1.0, made(*order, 64, dtype=torch.int32))
    out = forward_of(q, q, q, tables, "sm_90")
    for needed in (False, bias is not None):
        rest = (q, None, out.out, out.total, out.peak, q, q, q, tables, [True, True, True, needed])
        steps = backward_of(*rest, "sm_90").steps
        orders = {
            step.kernel.__name__: step.arguments["order"]
            for step in steps
            if isinstance(step, Launch) and not step.constants.get("TURNED")
        }
        assert ("token_sets_bias_gradient" in orders) is (needed and 1 not in bias[2:])
        orders.pop("token_sets_key_gradient")
        assert {one is not None for one in orders.values()} == {kept or not needed}


@compiles
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["lists", "mask"])
def test_launches_neither_look_at_values_nor_leave_the_device(kind, prefix, biased):
    """Tensors that pretend to lie on a GPU have no values: who looked would raise."""
    from attnkit.kernels.triton.token_sets.launches import backward_of, forward_of

    with FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(2, 3, prefix + 64, 16) for _ in range(3))
        table = torch.empty(2, 3, 64, 5, dtype=torch.int64)
        if kind == "mask":
            table = torch.empty(2, 1, prefix + 64, prefix + 64, dtype=torch.bool)
        bias = torch.empty(1, 3, prefix + 64, prefix + 64) if biased else None
        own = prefix if kind == "lists" else 0
        tables = SetTables(table, torch.empty(1, 3, prefix + 64, dtype=torch.bool), bias, own, own, 0.25)
        found = forward_of(q, k, v, tables, "sm_90")
        grad, needs = torch.empty_like(found.out), [True, True, True, biased]
        back = backward_of(grad, found.total, found.out, found.total, found.peak, q, k, v, tables, needs, "sm_90")
        for step in (*found.steps, *back.steps):
            if isinstance(step, Launch):
                given = [one for one in step.arguments.values() if isinstance(one, torch.Tensor)]
                assert given and all(one.is_cuda for one in given)
            else:
                step.run()
    names = [step.kernel.__name__ for step in (*found.steps, *back.steps) if isinstance(step, Launch)]
    # The forward pass and the two gradients need lists each.
    lists = ["token_set_unions"] if kind == "mask" else ["token_set_marks", "token_set_unions"]
    pairs = ["token_sets_bias_gradient"] * biased
    assert names == [
        *(*lists, "token_sets_forward"),
        *(*lists, "token_sets_query_gradient", *pairs),
        *(*lists, "token_sets_key_gradient"),
    ]
