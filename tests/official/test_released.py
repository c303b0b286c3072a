"""Released models under the authors' names: counted, exchanged, and equal to the authors' own numbers."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit_models import export_official, import_official
from attnkit_models.checkpoints.family import RELEASED

# Tensors in the authors' state dicts.
COUNTS = {
    "biformer_tiny": 264,
    "biformer_small": 518,
    "biformer_base": 518,
    "biformer_stl": 201,
    "biformer_stl_nchw": 201,
    "qna_vit_tiny": 214,
    "qna_vit_tiny_7x7": 214,
    "qna_vit_small": 358,
    "qna_vit_base": 358,
    "sparsifiner_deit_tiny": 224,
    "sparsifiner_deit_small": 224,
    "sparsifiner_deit_base": 224,
    "sparsifiner_lvvit_small": 300,
}


def shapes_of(name):
    """Of the tensors under the authors' names, of a model without numbers."""
    with torch.device("meta"):
        return {key: tuple(one.shape) for key, one in export_official(name, attnkit.build(name)).items()}


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_back(name, released_state):
    """export(import(sd)) == sd, bit for bit."""
    shapes = shapes_of(name)
    assert len(shapes) == COUNTS[name]
    state = released_state(shapes)
    again = export_official(name, import_official(name, state))
    assert list(again) == list(shapes)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["biformer_tiny", "qna_vit_tiny", "sparsifiner_deit_tiny"])
def test_half_precision_comes_back_as_the_same_numbers_in_float32(name, dtype, released_state):
    shapes = shapes_of(name)
    whole = released_state(shapes)
    state = {key: one.to(dtype) if one.is_floating_point() else one for key, one in whole.items()}
    model = import_official(name, state)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    again = export_official(name, model)
    for key, one in state.items():
        assert again[key].dtype == whole[key].dtype, key
        assert torch.equal(again[key], one.to(whole[key].dtype)), key
    assert any(not torch.equal(again[key], one) for key, one in whole.items())


def test_every_released_model_is_counted():
    assert set(COUNTS) == set(RELEASED)


def test_numbers_of_the_authors_code(golden_variant, released_state):
    one = golden_variant
    variant = one.facts["upstream_class"]
    model = import_official(variant, released_state(shapes_of(variant)))
    assert not model.training
    images = one.tensors["input"].requires_grad_()
    logits = model(images)
    one.check(logits, "output")
    one.check(torch.autograd.grad(logits, images, one.tensors["cotangent"])[0], "grad_input")


# The arguments that the authors build these with, as far as they are not the defaults of their code.
DEIT = {"embed_dim": 384, "num_heads": 6, "qkv_bias": True, "reduce_n_factor": 6, "attn_keep_rate_list": [0.25] * 12}
LV_VIT = {"embed_dim": 384, "depth": 16, "num_heads": 6, "mlp_ratio": 3.0, "skip_lam": 2.0, "return_dense": True}
LV_VIT |= {"reduce_n_factor": 6, "attn_keep_rate_list": [0.25] * 16}
SWIN = {"norm_layer": "BatchNorm2d"}
ARGUMENTS = [
    ("biformer_stl", "biformer_stl", SWIN, (90, 70)),
    ("biformer_stl_nchw", "biformer_stl_nchw", SWIN, (90, 70)),
    ("sparsifiner_deit_small", "sparsifiner", {"ctor": DEIT, "cfg": {}}, (224, 224)),
    ("sparsifiner_lvvit_small", "sparsifiner_lvvit", {"ctor": LV_VIT, "cfg": {}}, (224, 224)),
]


@pytest.mark.parametrize(("name", "family", "hparams", "size"), ARGUMENTS)
@torch.no_grad()
def test_a_released_model_is_what_its_authors_build(name, family, hparams, size, released_state):
    """Padding that takes part and class tokens that compete included; attnkit's own recipe takes the same weights."""
    recipe = attnkit.build(name).eval()
    state = released_state({key: tuple(one.shape) for key, one in export_official(name, recipe).items()})
    model = import_official(name, state)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    right = import_official(family, state, hparams)(images)
    assert torch.equal(model(images), right)
    recipe.load_state_dict(model.state_dict())
    assert not torch.allclose(recipe(images), right, rtol=1e-3)
    assert all(torch.equal(one, state[key]) for key, one in export_official(name, recipe).items())
