"""The files in examples/ work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnkit

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_comparison_has_a_row_per_primitive():
    command = [sys.executable, str(EXAMPLES / "compare.py"), "4", "6"]
    # The checkout need not be installed.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert {line.split()[0] for line in found.stdout.splitlines()[1:]} == set(attnkit.list_primitives())


def test_the_configuration_builds():
    yaml = pytest.importorskip("yaml")
    plain = yaml.safe_load((EXAMPLES / "window_and_conv.yaml").read_text(encoding="utf-8"))
    model = attnkit.build({**plain["model"], "num_classes": 10, "in_chans": 1, "img_size": 32})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
