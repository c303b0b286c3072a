"""Parameters and multiply-adds of the recipes, held against the papers and their authors' code."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import factory

# Counted in the authors' own models; `bigbird` and the micro models have no such figure.
PARAMETERS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "qna_vit_tiny": 15_715_560,
    "qna_vit_tiny_7x7": 15_753_960,
    "qna_vit_small": 24_971_560,
    "qna_vit_base": 55_670_008,
    "sparsifiner_deit_small": 22_251_880,
    "sparsifiner_lvvit_small": 26_420_112,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}

# In 10**9 at 224 x 224 pixels, as the authors' tools count them (norms and the like included by some).
MULTIPLY_ADDS = {
    "biformer_tiny": (2.228, 0.01),
    "biformer_small": (4.487, 0.01),
    "biformer_base": (9.795, 0.01),
    "biformer_stl": (4.590, 0.01),
    "biformer_stl_nchw": (4.593, 0.01),
    "qna_vit_tiny": (2.425, 0.02),
    "qna_vit_tiny_7x7": (2.514, 0.02),
    "qna_vit_small": (4.347, 0.02),
    "qna_vit_base": (9.509, 0.02),
    "vit_small": (4.6, 0.01),
}


def parameters(name: str, **overrides) -> int:
    with torch.device("meta"):
        return sum(one.numel() for one in attnkit.build(name, **overrides).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_paper(name):
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "millions"), [("bigbird_vit_tiny", 29), ("bigbird_vit_base", 85)])
def test_big_bird_is_as_large_as_the_paper_says(name, millions):
    assert parameters(name) == pytest.approx(millions * 1e6, rel=0.05)


def test_a_mask_predictor_costs_what_the_paper_s_does():
    added = parameters("sparsifiner_deit_small") - parameters("vit_small")
    assert added == 12 * (2 * 197 * 32 + 2 * (64 * 32 + 32)) == 201_216


@pytest.mark.parametrize("name", attnkit.list_models("*_micro"))
def test_micro_models_are_small(name):
    assert 150_000 < parameters(name, num_classes=10, in_chans=1) < 400_000


def test_bigbird_vit_is_the_tiny_one():
    assert factory.config("bigbird_vit") == attnkit.factory.config("bigbird_vit_tiny")


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_the_paper(name):
    billions, tolerance = MULTIPLY_ADDS[name]
    assert attnkit.flops(attnkit.build(name), 224).total / 1e9 == pytest.approx(billions, rel=tolerance)
