"""Single layers and blocks of the authors' codes: their own numbers, and their weights back again."""

from __future__ import annotations

import pytest
import torch

from attnkit_models import export_official, import_official_layer
from attnkit_models.checkpoints.family import layer_named
from attnkit_models.checkpoints.keys import outward


def test_the_authors_numbers(golden_layer):
    one = golden_layer
    upstream = one.facts["upstream_class"]
    module = import_official_layer(upstream, one.state, one.hparams)
    assert not module.training
    x = one.tensors["input"].requires_grad_()
    out = module(x, *token_mask(one))
    one.check(out, "output", rows_valid(one))
    own = dict(module.named_parameters())
    found = torch.autograd.grad(out, [x, *own.values()], one.tensors["cotangent"], allow_unused=True)
    one.check(found[0], "grad_input")
    reached = {name: gradient for name, gradient in zip(own, found[1:], strict=True) if gradient is not None}
    gradients = outward(layer_named(upstream).table(module).pairs(reached), reached)
    expected = {name: name.partition(".")[2] for name in one.tensors if name.startswith(("grad.", "grad_state."))}
    for name, key in expected.items():
        one.check(gradients[key], name)
    assert not any(key in gradients for key in one.facts.get("notes", {}).get("params_without_grad", ()))


def token_mask(one):
    """The second argument, where there is one."""
    return [one.tensors[name] for name in ("token_mask_in",) if name in one.tensors]


def rows_valid(one):
    """Rows of masked tokens hold nothing."""
    return one.tensors["rows_valid"].bool() if "rows_valid" in one.tensors else None


def test_their_weights_come_back(golden_layer):
    """export(import(sd)) == sd, bit for bit."""
    one = golden_layer
    upstream = one.facts["upstream_class"]
    again = export_official(upstream, import_official_layer(upstream, one.state, one.hparams))
    assert again.keys() == one.state.keys()
    assert all(torch.equal(again[key], one.state[key]) for key in again)


@pytest.mark.parametrize("backend", ["reference", "gather", "sdpa,reference"])
def test_the_same_on_every_backend(golden_layer, backend):
    from attnkit import use_backend

    one = golden_layer
    module = import_official_layer(one.facts["upstream_class"], one.state, one.hparams)
    with torch.no_grad(), use_backend(f"{backend},reference"):
        one.check(module(one.tensors["input"], *token_mask(one)), "output", rows_valid(one))
