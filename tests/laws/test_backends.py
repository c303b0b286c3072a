"""Every law for every backend over every kind of layout that it accepts."""

from __future__ import annotations

import pytest
import torch

from attnkit.kernels import flex
from attnkit.kernels.chunked import blocks
from attnkit.registry import BACKENDS
from attnkit.testing import KINDS, LAWS, check_backend

KINDS_OF = {
    "reference": KINDS,
    "sdpa": KINDS,
    "chunked": ("stencil", "blocks", "token_mask", "token_sets"),
    "gather": ("stencil", "blocks", "token_sets"),
}
CASES = [
    (backend, kind, law.name)
    for backend, kinds in KINDS_OF.items()
    for kind in kinds
    for law in LAWS.values()
    if law.attention is not None
]


@pytest.mark.parametrize(("backend", "kind", "law"), CASES)
def test_law(backend, kind, law, examples):
    checked = check_backend(backend, kinds=[kind], laws=[law], max_examples=examples)
    assert checked.tried[law] >= examples


@pytest.mark.parametrize("law", [law.name for law in LAWS.values() if law.attention is not None])
def test_law_of_fused_blocks(law, examples, monkeypatch):
    # Layouts as small as are drawn here have their products written out otherwise.
    monkeypatch.setattr(blocks, "SMALL", 0)
    checked = check_backend("chunked", kinds=["blocks"], laws=[law], max_examples=examples)
    assert checked.tried[law] >= examples


FORWARD = (
    *("equals_dense", "backends_agree", "independence", "convex_hull", "translation", "empty_rows", "seeds_only"),
    "finite_gradients",
)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention without its compiler, which takes seconds for every shape: the same masks and scores, step by step.

    That takes float64 too. There is no backward pass on the CPU either way. Nor is it traced, which PyTorch does where
    it does not compile, in half a second for every shape.
    """
    import torch.nn.attention.flex_attention as module

    refuses, flex_attention = flex.FlexBackend.why_not, module.flex_attention
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(
        flex.FlexBackend, "why_not", lambda *of: tuple(one for one in refuses(*of) if "on the CPU takes" not in one)
    )


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("law", FORWARD)
def test_forward_laws_of_flex(law, examples):
    with torch.no_grad():
        assert check_backend("flex", laws=[law], max_examples=examples).tried[law] > 0


def test_no_backend_is_forgotten():
    # triton computes on GPUs only; `tests/kernels/triton` holds it there, and by Triton's interpreter.
    # So does xformers; `tests/kernels/test_xformers.py` holds it beside a stand-in.
    assert {name for name, target in BACKENDS.items() if target} == {*KINDS_OF, "flex", "triton", "xformers"}
