"""torch.compile without graph breaks and torch.export give what the plain model gives."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil

import pytest
import torch

import attnkit
from attnkit.testing import randomize_parameters

# Without a C++ compiler Inductor's lowering is tested up to the point where it would write code.
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
INDUCTOR = "inductor" if COMPILER else "aot_eager_decomp_partition"

MICROS = attnkit.list_models("*_micro")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


def built(name: str) -> torch.nn.Module:
    """A micro model with one block of every kind, which is all that a compiler has to understand."""
    depth = {"depth": 1} if name == "vit_micro" or "sparsifiner" in name else {"stages[*].depth": 1}
    return attnkit.build(name, num_classes=10, **depth)


@pytest.mark.parametrize("name", MICROS)
def test_a_compiled_step_of_training_is_the_eager_one(name, images):
    model = built(name).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(height=32, width=32)
    for _ in range(2):
        expected, found = model(x), compiled(x)
        torch.testing.assert_close(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    expected = {name: one.grad for name, one in model.named_parameters()}
    found = {name: one.grad for name, one in twin.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))


def test_a_compiled_step_with_checkpointing_is_the_eager_one(images):
    # The number of the draw is raised in the very graph that runs its blocks a second time.
    config = built("bigbird_vit_micro").config
    model = attnkit.build(dataclasses.replace(config, stages=config.stages[:1])).train()
    # At its start attention is so even that other windows would hardly show.
    randomize_parameters(model, seed=0, scale=0.3)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(height=32, width=32)
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    found = {name: one.grad for name, one in twin.named_parameters()}
    expected = {name: one.grad for name, one in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_evaluation_is_the_eager_one(images):
    # Of all the models, this one does something else in evaluation than in training.
    config = built("bigbird_vit_micro").config
    model = attnkit.build(dataclasses.replace(config, stages=config.stages[:1])).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = images(height=32, width=32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_agrees_on_big_bird(images):
    # In training, where the number of the draw is a tensor too.
    config = built("bigbird_vit_micro").config
    model = attnkit.build(dataclasses.replace(config, stages=config.stages[:1])).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=INDUCTOR)
    x = images(height=32, width=32)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MICROS)
def test_exported_is_eager(name, images):
    model = built(name).eval()
    x = images(3, height=32, width=32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
