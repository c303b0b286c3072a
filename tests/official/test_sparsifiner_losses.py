"""Losses of Sparsifiner's two stages: the authors' own numbers, and what of a model they look at."""

from __future__ import annotations

import copy

import pytest
import torch

import attnkit
from attnkit import Dense, MaskReconstruction, Mix
from attnkit.errors import ConfigError, ShapeError
from attnkit.testing import random_tensor, randomize_parameters
from attnkit_models.distillation import attention_reconstruction, distillation, distilled, watching


@pytest.fixture
def one(golden):
    return golden("sparsifiner/losses")


def leaves(one, *names):
    return {name: one.tensors[name].clone().requires_grad_() for name in names}


def check_gradients(one, stage, total, found):
    for name, leaf in found.items():
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
        one.check(torch.zeros_like(leaf) if gradient is None else gradient, f"{stage}.grad.{name}")


@pytest.mark.parametrize("stage", ["finetune", "finetune_tokenmask"])
def test_distillation(one, stage):
    found = leaves(one, "cls_s", "token_s")
    left = one.tensors["token_mask"].bool() if stage == "finetune_tokenmask" else None
    teacher = one.tensors["cls_t"], one.tensors["token_t"]
    labels = one.tensors["labels_soft"]
    terms = distillation(found["cls_s"], teacher[0], found["token_s"], teacher[1], labels, left=left)
    for ours, theirs in (("labels", "cls"), ("logits", "cls_distill"), ("tokens", "token_distill")):
        one.check(terms[ours][None], f"{stage}.{theirs}_loss")
    total = sum(terms.values())
    one.check(total[None], f"{stage}.total")
    check_gradients(one, stage, total, found)


@pytest.mark.parametrize(
    ("stage", "maps", "weight"), [("recon", "attn_t", 0.01), ("self_distill", "unmasked_attn", 0.002)]
)
def test_reconstruction(one, stage, maps, weight):
    found = leaves(one, "approx_attn.0", "approx_attn.1")
    total = attention_reconstruction(
        list(found.values()), [one.tensors[f"{maps}.{at}"] for at in (0, 1)], weight=weight
    )
    name = {"recon": "attn_recon_loss", "self_distill": "attn_self_distill_loss"}[stage]
    one.check(total[None], f"{stage}.{name}")
    one.check(total[None], f"{stage}.total")
    check_gradients(one, stage, total, found)


def test_weights_and_labels(one):
    given = [one.tensors[name] for name in ("cls_s", "cls_t", "token_s", "token_t")]
    hard = one.tensors["labels_soft"].argmax(1)
    terms = distillation(*given, hard, weights={"labels": 2.0, "tokens": 0.0})
    assert terms.keys() == {"labels", "logits"}
    torch.testing.assert_close(terms["labels"], -2 * given[0].log_softmax(-1).gather(1, hard[:, None]).mean())
    with pytest.raises(ConfigError, match="there is no term 'token'; the terms are labels, logits, tokens"):
        distillation(*given, hard, weights={"token": 1.0})


def test_guesses_and_maps_that_do_not_fit():
    guess = torch.zeros(1, 2, 16, 17)
    with pytest.raises(ShapeError, match="guesses of 1 layers and maps of 0"):
        attention_reconstruction([guess], [])
    with pytest.raises(ShapeError, match=r"a guess \(1, 2, 16, 17\) is of no attention map \(1, 3, 17, 17\)"):
        attention_reconstruction([guess], [torch.zeros(1, 3, 17, 17)])


GUESSING = Mix((MaskReconstruction(3, 64, prefix=1),))


def student_and_teacher():
    student = randomize_parameters(attnkit.build("vit_micro", mix=GUESSING, num_classes=5), seed=1)
    teacher = attnkit.build("vit_micro", num_classes=5).eval()
    teacher.load_state_dict({name: one for name, one in student.state_dict().items() if "predictor" not in name})
    return student, teacher


def test_what_a_watched_model_did():
    student, teacher = student_and_teacher()
    images = random_tensor(2, 3, 32, 32, seed=0, dtype=torch.float32)
    with watching(student) as seen:
        logits = student(images)
    with torch.no_grad(), watching(teacher) as right:
        torch.testing.assert_close(teacher(images), logits)
    assert [tuple(one.shape) for one in seen.guesses] == [(2, 3, 64, 65)] * 4
    for own, other in zip(seen.maps(), right.maps(), strict=True):
        torch.testing.assert_close(own, other)
        torch.testing.assert_close(other.sum(-1), torch.ones_like(other[..., 0]))
    assert not right.guesses
    before = len(seen.visits)
    student(images)
    assert len(seen.visits) == before


def test_the_first_stage_learns():
    """A few steps on the predictors alone bring the guess nearer to the teacher's attention."""
    student, teacher = student_and_teacher()
    images = random_tensor(4, 3, 32, 32, seed=0, dtype=torch.float32)
    before = copy.deepcopy(student.state_dict())
    predictors = [one for name, one in student.named_parameters() if ".predictor." in name]
    optimizer = torch.optim.AdamW(predictors, lr=2e-2)
    losses = []
    for _ in range(20):
        with watching(student) as seen:
            student(images)
        with torch.no_grad(), watching(teacher) as right:
            teacher(images)
        loss = attention_reconstruction(seen.guesses, right.maps())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, one in student.state_dict().items() if not torch.equal(one, before[name])}
    assert changed and all(".predictor." in name for name in changed)
    # The second stage begins with these weights.
    sparse = attnkit.build(
        "vit_micro",
        mix={"groups": [{"kind": "mask_predictor", "heads": 3, "tokens": 64, "keep": 0.25, "prefix": 1}]},
        num_classes=5,
    )
    sparse.load_state_dict(student.state_dict())


def test_what_is_compared():
    images = random_tensor(2, 3, 32, 32, seed=0, dtype=torch.float32)
    model = randomize_parameters(
        attnkit.build("vit_micro", num_classes=5, keep_tokens=[1.0, 0.5, 0.5, 0.25]), seed=1
    ).eval()
    logits, tokens, left = distilled(model, images)
    assert torch.equal(logits, model(images))
    assert tokens.shape == (2, 64, 72) and left.sum(1).tolist() == [16, 16]
    model = randomize_parameters(attnkit.build("vit_micro", num_classes=5, aux_head=True), seed=1).eval()
    logits, tokens, left = distilled(model, images)
    torch.testing.assert_close(logits + 0.5 * tokens.amax(1), model(images))
    assert left is None
    with pytest.raises(ConfigError, match="build the model with global_pool='token'"):
        distilled(attnkit.build("vit_micro", mix=Mix((Dense(3),)), global_pool="avg"), images)
