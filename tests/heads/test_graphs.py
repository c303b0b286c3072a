"""Compiled and exported mixes give what the eager ones give."""

from __future__ import annotations

import io

import pytest
import torch
from torch.export import Dim

from attnkit import Block, Conv, Grid, HeadMix, RandomWindow, TopKRegion, Window, attend, use_backend
from attnkit import Dense as DenseHeads
from attnkit.layouts import Blocks, Dense, Stencil
from attnkit.registry import list_primitives
from attnkit.testing import random_qkv, random_tensor

GRID = Grid(4, 6, prefix=1)


class OnGrid(torch.nn.Module):
    """A module of one input, as graphs are made of."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix(x, GRID)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()


def rows(batch=2, seed=0, grad=False):
    return random_tensor(batch, 25, 8, seed=seed, dtype=torch.float32, grad=grad)


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", list_primitives(), indirect=True)
def test_compiled_to_one_graph_with_gradients(random_mix, sample):
    model = OnGrid(random_mix(sample))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, model):
        x = rows(grad=True)
        out = run(x)
        model.zero_grad()
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(one.grad for one in model.parameters() if one.grad is not None)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # The same graph computes with other numbers: rows without gradients would be compiled anew.
    with torch.compiler.set_stance("fail_on_recompile"):
        close(compiled(rows(seed=1, grad=True)), model(rows(seed=1)))


def test_compiled_random_windows_in_training_and_evaluation(random_mix):
    compiled_model, model = (OnGrid(random_mix(RandomWindow(2, 5))) for _ in range(2))
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    right = model(rows())
    with torch.no_grad():
        for module in (compiled_model, model):
            module.train()
        for _ in range(3):
            close(compiled(rows()), model(rows()))
        assert compiled_model.mix.draws.item() == model.mix.draws.item() == 3
        compiled_model.eval()
        close(compiled(rows()), right)


def test_compiled_with_token_masks_and_other_batches(random_mix):
    mix = random_mix([TopKRegion(1, 2, 2), Conv(1)])
    compiled = torch.compile(lambda x, kept: mix(x, GRID, token_mask=kept), fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch in (2, 3, 5):
            kept = torch.rand(batch, 25, generator=torch.Generator().manual_seed(batch)) < 0.8
            close(compiled(rows(batch), kept), mix(rows(batch), GRID, token_mask=kept))


def test_a_compiled_function_follows_use_backend():
    layout = Blocks.windows(Grid(4, 6), 2)
    q, k, v = random_qkv((24, 24), dtype=torch.float32)
    seen = []

    def counted(graph, _):
        seen.append(sorted({str(node.target) for node in graph.graph.nodes if "attention" in str(node.target)}))
        return graph.forward

    compiled = torch.compile(lambda q, k, v: attend(q, k, v, layout), fullgraph=True, backend=counted)
    right = attend(q, k, v, layout)
    with use_backend("reference"):
        close(compiled(q, k, v), right)
    with use_backend("sdpa"):
        close(compiled(q, k, v), right)
    assert len(seen) == 2, "the compiled function went on with the backend it was first compiled for"
    assert not seen[0]
    assert seen[1]


@pytest.mark.parametrize(
    "layout", [Dense(24), Stencil(Grid(4, 6), 3), Blocks.windows(Grid(4, 6), 2)], ids=lambda one: one.kind
)
def test_layouts_made_outside_a_graph(layout):
    q, k, v = random_qkv((24, 24), dtype=torch.float32)
    kept = torch.arange(24) < 20
    compiled = torch.compile(
        lambda q, k, v, kept: attend(q, k, v, layout.restrict(kept)), fullgraph=True, backend="eager"
    )
    close(compiled(q, k, v, kept), attend(q, k, v, layout.restrict(kept)))


def test_exported_with_many_primitives_in_one_mix(random_mix, samples):
    # What takes longest to trace is exported on its own below.
    left_out = ("learned_query", "learned_query_strided", "learned_upsample", "random_window")
    groups = [options for name, options in samples.items() if name not in left_out]
    model = OnGrid(random_mix(groups, dim=8))
    exported = torch.export.export(model, (rows(),)).module()
    close(exported(rows(seed=3)), model(rows(seed=3)))


def test_exported_for_any_batch(random_mix, sample):
    model = OnGrid(random_mix(sample))
    exported = torch.export.export(model, (rows(3),), dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}}).module()
    for batch in (1, 2, 7):
        close(exported(rows(batch)), model(rows(batch)))


def test_exported_without_gradients_or_training_state_of_its_own(random_mix):
    """What is exported in evaluation has the fixed windows of evaluation in it."""
    model = OnGrid(random_mix(RandomWindow(2, 5)))
    with torch.no_grad():
        exported = torch.export.export(model, (rows(),)).module()
    model.mix.train()(rows(), GRID)
    model.mix.eval()
    close(exported(rows()), model(rows()))


def test_compiled_with_one_grid_after_the_other():
    layer = HeadMix(8, [Conv(1, pointwise=False), DenseHeads(1)]).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for sizes in ((4, 6), (6, 4), (3, 8)):
            close(compiled(rows(), Grid(*sizes, prefix=1)), layer(rows(), Grid(*sizes, prefix=1)))


# torch 2.10's own loader warns of the buffer that it reads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("make, strict", [(HeadMix, False), (Block, True)])
def test_exported_with_its_grid_and_saved(make, strict):
    layer = make(8, [Conv(1), Window(1, 3)]).eval()
    shapes = {"x": {0: Dim("batch", min=1, max=64)}, "grid": []}
    program = torch.export.export(layer, (rows(3), GRID), dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for one in (program, torch.export.load(buffer)):
        close(one.module()(rows(2), Grid(4, 6, prefix=1)), layer(rows(2), GRID))
        with pytest.raises(ValueError, match="exported input tree spec"):
            one.module()(rows(2), Grid(6, 4, prefix=1))


def test_a_map_can_be_exported_too():
    mix = HeadMix(8, [Conv(1), RandomWindow(1, 5)]).eval()
    x = random_tensor(2, 4, 6, 8, seed=0, dtype=torch.float32)
    close(torch.export.export(mix, (x,)).module()(x), mix(x))
