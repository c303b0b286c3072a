"""Golden numbers of the papers' own code: `tests/data/<source>/<name>.safetensors` beside a `.json` that says what."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"


class Golden:
    """Tensors and facts of one file."""

    def __init__(self, path):
        self.tensors = load_file(path)
        self.facts = json.loads(path.with_suffix(".json").read_text())
        self.state = {
            key.removeprefix("state."): value for key, value in self.tensors.items() if key.startswith("state.")
        }
        # Weights that follow the rule are not stored, only their names and shapes.
        self.state = self.state or random_state(self.facts.get("state", {}))
        self.hparams = self.facts["hparams"]

    def check(self, found, name, rows=None):
        """Compares within the tolerance that goes with the numbers."""
        expected = self.tensors[name].to(found.dtype)
        if rows is not None:
            found, expected = found[rows], expected[rows]
        torch.testing.assert_close(found, expected, **self.facts["tolerance"], msg=lambda text: f"{name}: {text}")


def pytest_generate_tests(metafunc):
    """golden_layer, golden_model and golden_variant stand for every file of that kind."""
    for kind in ("layer", "model", "variant"):
        if f"golden_{kind}" in metafunc.fixturenames:
            facts = {path: json.loads(path.read_text()) for path in sorted(DATA.glob("*/*.json"))}
            paths = [path.with_suffix(".safetensors") for path, one in facts.items() if one["kind"] == kind]
            names = [f"{path.parent.name}/{path.stem}" for path in paths]
            metafunc.parametrize(f"golden_{kind}", paths, ids=names, indirect=True)


@pytest.fixture
def golden_layer(request):
    return Golden(request.param)


@pytest.fixture
def golden_model(request):
    return Golden(request.param)


@pytest.fixture
def golden_variant(request):
    return Golden(request.param)


@pytest.fixture(scope="session")
def golden():
    """golden("biformer/bra_std") -> Golden."""
    return lambda name: Golden(DATA / f"{name}.safetensors")


def random_state(shapes):
    """Weights that are a function of each name and shape (the goldens' own rule)."""
    state = {}
    for key, shape in shapes.items():
        dice, count = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF), math.prod(shape)
        last = key.rpartition(".")[2]
        if last == "num_batches_tracked":
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        if last == "running_var" or last.startswith("gamma"):
            numbers = dice.uniform(0.5, 1.5, count)
        elif last in ("running_mean", "bias"):
            numbers = 0.1 * dice.standard_normal(count)
        elif len(shape) == 1:
            numbers = 1 + 0.2 * dice.standard_normal(count)
        else:
            numbers = dice.standard_normal(count) / math.sqrt(math.prod(shape[1:]))
            numbers *= 0.2 if ".pos_embed." in key else 1.0
        state[key] = torch.from_numpy(numbers.astype(np.float32)).reshape(shape)
    return state


@pytest.fixture(scope="session")
def released_state():
    return random_state
