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


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_back(name, released_state):
    """export(import(sd)) == sd, bit for bit."""
    shapes = {key: tuple(one.shape) for key, one in export_official(name, attnkit.build(name)).items()}
    assert len(shapes) == COUNTS[name]
    state = released_state(shapes)
    again = export_official(name, import_official(name, state))
    assert list(again) == list(shapes)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_every_released_model_is_counted():
    assert set(COUNTS) == set(RELEASED)


def test_numbers_of_the_authors_code(golden_variant, released_state):
    one = golden_variant
    variant = one.facts["upstream_class"]
    shapes = {key: tuple(value.shape) for key, value in export_official(variant, attnkit.build(variant)).items()}
    model = import_official(variant, released_state(shapes))
    assert not model.training
    images = one.tensors["input"].requires_grad_()
    logits = model(images)
    one.check(logits, "output")
    one.check(torch.autograd.grad(logits, images, one.tensors["cotangent"])[0], "grad_input")
