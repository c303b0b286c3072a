"""Recipes on every backend, compiled, exported, and at the usual image sizes.

With ATTNKIT_RECIPES=all (`make recipes`) these are all registered recipes: whole at the sizes, and with one block a
stage for the rest, since the blocks of a stage run the same code. They are compiled by `aot_eager`, which traces as far
as a compiler would and makes no machine code. By default they are the micro models on the backends,
and one recipe of every kind at the sizes; `test_compiled.py` compiles and exports the micro models.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

import attnkit
from attnkit.kernels import AttendCall, recording
from attnkit.kernels.call import AttendResult
from attnkit.kernels.dispatch import backend_named, wrapping
from attnkit.registry import BACKENDS

ALL = os.environ.get("ATTNKIT_RECIPES") == "all"
# `bigbird_vit` is another name of `bigbird_vit_tiny`.
RECIPES = [name for name in attnkit.list_models() if name != "bigbird_vit"]
MICROS = attnkit.list_models("*_micro")
# One of every kind of block, stem and head.
KINDS = [
    "biformer_stl",
    "biformer_stl_nchw",
    "biformer_tiny",
    "bigbird_vit_tiny",
    "bigbird_vit_tiny_lineage",
    "qna_vit_tiny_7x7",
    "sparsifiner_deit_tiny",
    "sparsifiner_lvvit_small",
    "vit_tiny",
]
SIZES = [(224, 224), (256, 256), (192, 320), (512, 512)]
# Made for 32 x 32 pixels and patches of 4 x 4: a predicted map of 16,385 x 16,385 tokens for each head.
TOO_LARGE = [("sparsifiner_micro", (512, 512))]
RUNS = [(name, size) for name in (RECIPES if ALL else KINDS) for size in SIZES if (name, size) not in TOO_LARGE]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.fixture(params=RECIPES if ALL else MICROS)
def few_blocks(request: pytest.FixtureRequest, shallow) -> torch.nn.Module:
    return shallow(request.param).eval()


@pytest.fixture
def own_size(few_blocks, images) -> torch.Tensor:
    """Images of the size that a recipe is made for."""
    height, width = few_blocks.img_size
    return images(1, 3, height, width)


@pytest.mark.parametrize(
    "backend", [name for name, target in BACKENDS.items() if target and name not in ("flex", "triton")]
)
def test_every_backend_gives_the_same_logits(few_blocks, own_size, backend):
    """In float64, where rounding does not flip a choice of keys in one block that the next blocks then see."""
    model, x = few_blocks.double(), own_size.double()
    with torch.no_grad(), attnkit.use_backend("reference"):
        expected = model(x)
    # What a backend refuses runs on the reference.
    with torch.no_grad(), attnkit.use_backend(f"{backend},reference"), recording() as choices:
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for choice in choices:
        assert choice.backend == backend or choice.reasons[backend]


if ALL:

    def test_every_call_is_the_same_on_flex(few_blocks, own_size):
        """Call by call, because it has no float64 on the CPU."""
        flex = backend_named("flex")
        found = []

        def compare(call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
            result = compute()
            if not flex.why_not(call):
                torch.testing.assert_close(flex.run(call).out, result.out, rtol=1e-4, atol=1e-5)
            found.append(call)
            return result

        with torch.no_grad(), wrapping(compare):
            few_blocks(own_size)
        assert found

    def test_it_compiles_without_a_graph_break(few_blocks, own_size):
        compiled = torch.compile(few_blocks, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(own_size), few_blocks(own_size))

    def test_it_exports(few_blocks, own_size):
        with torch.no_grad():
            program = torch.export.export(few_blocks, (own_size,))
            torch.testing.assert_close(program.module()(own_size), few_blocks(own_size))


@pytest.mark.parametrize(
    ("name", "size"), RUNS, ids=lambda one: one if isinstance(one, str) else "x".join(map(str, one))
)
def test_the_usual_image_sizes(name, size, images, shallow):
    model = (attnkit.build(name, num_classes=5) if ALL else shallow(name)).eval()
    with torch.no_grad():
        logits = model(images(1, 3, *size))
    assert logits.shape == (1, 5) and logits.isfinite().all()
