"""Whole models of the authors' codes, made small by their constructors' arguments: their own numbers, and back."""

from __future__ import annotations

import torch

from attnkit_models import export_official, import_official


def test_the_authors_numbers(golden_model):
    one = golden_model
    model = import_official(one.facts["family"], one.state, one.hparams)
    assert not model.training
    x = one.tensors["input"].requires_grad_()
    # QnA's models take images with the channels last.
    images = x.permute(0, 3, 1, 2) if one.facts["source"] == "qna" else x
    out = model(images)
    one.check(out, "output")
    one.check(torch.autograd.grad(out, x, one.tensors["cotangent"])[0], "grad_input")
    levels = [name for name in one.tensors if name.startswith("stage")]
    if levels:
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert len(maps) == len(levels)
        for level, found in enumerate(maps):
            one.check(found, f"stage{level}")


def test_their_weights_come_back(golden_model):
    """export(import(sd)) == sd, bit for bit."""
    one = golden_model
    again = export_official(one.facts["family"], import_official(one.facts["family"], one.state, one.hparams))
    assert again.keys() == one.state.keys()
    assert all(torch.equal(again[key], one.state[key]) for key in again)
