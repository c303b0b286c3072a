"""The kernel that makes all gradients of a window, compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnkit.kernels.triton.devices import DEVICE_CLASSES, SHARED

ROOT = Path(__file__).parents[3]

# Device class, dtype, tokens of a window, width, prefix, bias, mask; whether slots are empty.
WINDOWS = [
    *((device, "bfloat16", 49, 32, 0, False, False) for device in DEVICE_CLASSES),
    *((device, "float16", 64, 32, 1, True, True) for device in DEVICE_CLASSES),
    ("sm_90", "bfloat16", 16, 32, 0, True, False),
    ("sm_80", "float32", 9, 16, 1, True, True),
]

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.ahead import compiled
from attnkit.kernels.triton.blocks.launches import backward_of, forward_of
for words in json.loads(sys.stdin.read()):
    device, dtype, tokens, width, prefix, biased, masked = words
    def made(*shape, dtype=getattr(torch, dtype)):
        return torch.empty(*shape, dtype=dtype, device="meta")
    image = 16 * tokens
    q, k, v = made(2, prefix + image, 3, 4, width).permute(2, 0, 3, 1, 4)
    token, slot = made(1, 1, 16, tokens, dtype=torch.int64), made(1, 1, image, dtype=torch.int64)
    mask = made(2, 1, prefix + image, dtype=torch.bool) if masked else None
    bias = made(1, 4, 1, tokens, prefix + tokens) if biased else None
    tables = BlockTables(token, slot, token, slot, None, mask, bias, prefix, [masked] * 2, 0.1)
    first = forward_of(q, k, v, tables, device)
    given = (first.out, None, first.out, first.lse, q, k, v)
    launch = backward_of(*given, tables, [True, True, True, False], device).launches[0]
    print(json.dumps([words, launch.kernel.__name__, compiled(launch, device)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_nothing_spills_and_tensor_cores_multiply():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM]
    given = json.dumps(WINDOWS)
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(words) for words, _, _ in rows] == WINDOWS
    products = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for words, kernel, (registers, spilled, shared, instructions) in rows:
        assert kernel == "blocks_window_gradient"
        assert registers <= (512 if words[0] == "gfx942" else 255) and not spilled, words
        assert shared <= SHARED[words[0]], words
        if words[1] != "float32" and words[2] > 16:
            assert products[words[0]] in instructions, words
