"""QnA: layers, blocks and models equal the authors' own numbers; what they have no numbers for is derived."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.family import layer_named
from attnkit_models.checkpoints.keys import outward

LAYERS = ["qna_k3_s1", "qna_k7_s2", "qna_k5_bias_scaledrpe", "block_qna_down_k3", "mhsa_w4"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_authors_numbers(name, golden):
    one = golden(f"qna/{name}")
    upstream = one.facts["upstream_class"]
    module = import_official_layer(upstream, one.state, one.hparams)
    assert not module.training
    x = one.tensors["input"].requires_grad_()
    out = module(x)
    one.check(out, "output")
    own = dict(module.named_parameters())
    found = torch.autograd.grad(out, [x, *own.values()], one.tensors["cotangent"])
    one.check(found[0], "grad_input")
    gradients = dict(zip(own, found[1:], strict=True))
    for key, gradient in outward(layer_named(upstream).table(module).pairs(own), gradients).items():
        one.check(gradient, f"grad_state.{key}")
    again = export_official(upstream, module)
    assert set(again) == set(one.state)
    assert all(torch.equal(again[key], one.state[key]) for key in again)


def test_a_model_gives_the_authors_numbers(golden):
    one = golden("qna/qna_vit_micro")
    model = import_official("qna_vit", one.state, one.hparams)
    images = one.tensors["input"].requires_grad_()
    logits = model(images.permute(0, 3, 1, 2))
    one.check(logits, "output")
    one.check(torch.autograd.grad(logits, images, one.tensors["cotangent"])[0], "grad_input")
    again = export_official("qna_vit", model)
    assert set(again) == set(one.state)
    assert all(torch.equal(again[key], one.state[key]) for key in again)


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (192, 320), (512, 512)])
def test_sizes_at_which_the_authors_windows_do_not_divide_the_map(size):
    model = attnkit.build("qna_vit_tiny", **{"stages[*].depth": 1, "num_classes": 5}).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
