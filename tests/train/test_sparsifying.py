"""`attnkit train --recipe sparsifiner`: a dense teacher, then a sparse model that learns from it in two phases."""

from __future__ import annotations

import json

import pytest
import torch

import attnkit
from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit_models.train.configfile import choose_recipe
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.sparsifying import Sparsifying
from attnkit_models.train.sparsifying_options import DISTILLATION, RECONSTRUCTION, SparsifyingOptions
from attnkit_models.train.teacher import load_teacher

SMALL = ["--epochs", "2", "--warmup", "0", "--batch-size", "4"]


@pytest.fixture
def data(make_folder):
    return make_folder(a=8, b=8)


@pytest.fixture
def teacher(data, tmp_path):
    """The folder of a dense model's run."""
    out = tmp_path / "teacher"
    command = ["train", "--model", "vit_micro", "--set", "depth=2", "--img-size", "16", "--data", str(data), *SMALL]
    assert main([*command, "--out", str(out)]) == 0
    return out


def learning(teacher, keep_tokens=(), **options):
    """A sparse model in the teacher's shape with its objective, ready for a step."""
    dense = load_teacher(teacher)
    recipe = Sparsifying(SparsifyingOptions(**options), dense)
    model = attnkit.build(dense.sparse_config(), num_classes=len(dense.classes), keep_tokens=[*keep_tokens])
    recipe.begin(model)
    return dense, model, recipe.objective(model, TrainOptions(epochs=5, label_smoothing=0.0)).train()


def moved(model) -> set[str]:
    """Which parts of the blocks and around them have gradients."""
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    return {"predictor" if ".predictor." in name else "backbone" for name in names}


def test_from_a_teacher_to_a_sparse_model_in_one_command(data, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--recipe", "sparsifiner", "--teacher", str(teacher), "--data", str(data)]
    command += ["--epochs", "3", "--batch-size", "4", "--set", "mix.groups[0].keep=0.5"]
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "sparsifiner  epoch 1/3  reconstruction  loss" in printed
    assert "sparsifiner  epoch 3/3  distillation  loss" in printed
    assert "sparsifiner against vit_micro (teacher): " in printed and "MACs in attention" in printed

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == [RECONSTRUCTION, DISTILLATION, DISTILLATION]
    dense, sparse = json.loads((out / "comparison.json").read_text())
    assert (dense["model"], sparse["model"]) == ("vit_micro (teacher)", "sparsifiner")
    assert dense["val_accuracy"] == json.loads((teacher / "best.json").read_text())["val_accuracy"]
    assert sparse["parameters"] > dense["parameters"]
    header = json.loads((out / "best.json").read_text())
    [group] = header["model"]["mix"]["groups"]
    assert (group["kind"], group["tokens"], group["keep"], group["prefix"]) == ("mask_predictor", [4, 4], 0.5, 1)
    assert main(["predict", str(out), str(data / "a" / "0.png")]) == 0

    # A finished run goes on to where it is; with another teacher or other losses it is another run.
    before = (out / "last.safetensors").read_bytes()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert (out / "last.safetensors").read_bytes() == before
    assert main([*command, "--out", str(out), "--resume", "--set", "recipe.logits=1"]) == 2
    assert "recipe.logits was 0.5 and is now 1" in capsys.readouterr().err
    other = ["--teacher", str(teacher / "resume.safetensors")]
    assert main(["train", "--recipe", "sparsifiner", *other, "--data", str(data), "--out", str(tmp_path / "x")]) == 2
    assert "pass the best.safetensors" in capsys.readouterr().err


def test_a_sparse_model_starts_as_its_teacher_and_learns_in_two_phases(teacher):
    dense, model, objective = learning(teacher)
    weights = dense.model.state_dict()
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items() if name in weights)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    objective(images, labels, RECONSTRUCTION).backward()
    assert moved(model) == {"predictor"}
    model.zero_grad()
    objective(images, labels, DISTILLATION).backward()
    assert moved(model) == {"backbone"}
    # The teacher never changes: no gradients, and no mode in which it drops paths or counts batches.
    assert not any(one.requires_grad for one in dense.model.parameters()) and not dense.model.training
    assert all(torch.equal(one, weights[name]) for name, one in dense.model.state_dict().items())


def test_the_first_phase_compares_guesses_with_the_maps_of_the_teacher(teacher):
    dense, model, objective = learning(teacher, reconstruction=0.5)
    images = torch.randn(3, 3, 16, 16)
    found = []

    def note(_, given):
        found.append(given[0])

    for block in dense.model.blocks:
        block.mix.groups[0].register_forward_pre_hook(note)
    with torch.no_grad():
        dense.model(images)
    errors = []
    for block, inputs in zip(model.blocks, found, strict=True):
        weights = (inputs.q @ inputs.k.transpose(-2, -1) * inputs.q.shape[-1] ** -0.5).softmax(-1)
        guess = block.mix.groups[0].predictor.guess(inputs.q, inputs.k, inputs)
        assert guess.shape == (3, 3, 16, 17)
        errors.append((guess - weights[:, :, 1:]).square().sum())
    loss = objective(images, torch.zeros(3, dtype=torch.int64), RECONSTRUCTION)
    torch.testing.assert_close(loss, 0.5 * torch.stack(errors).mean())


def test_a_sparse_model_that_keeps_everything_has_nothing_to_learn_from_its_teacher(teacher):
    dense, model, objective = learning(teacher, labels=0.0)
    full = attnkit.build(dense.sparse_config(keep=1.0), num_classes=2)
    full.load_state_dict(model.state_dict())
    objective.model = full
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    assert float(objective(images, labels, DISTILLATION).detach()) < 1e-9
    objective.model = model
    assert float(objective(images, labels, DISTILLATION).detach()) > 1e-6


def test_a_student_that_leaves_tokens_out(teacher):
    """The first phase sees all tokens, for only the teacher runs; the second compares those that are left."""
    dense, model, objective = learning(teacher, [1.0, 0.5], labels=0.0, logits=0.0, tokens=2.0)
    _, whole, other = learning(teacher)
    whole.load_state_dict(model.state_dict())
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 0])
    first = objective(images, labels, RECONSTRUCTION)
    torch.testing.assert_close(first, other(images, labels, RECONSTRUCTION))
    loss = objective(images, labels, DISTILLATION)
    with torch.no_grad():
        (found, left), (wanted, _) = model.forward_tokens(images), dense.model.forward_tokens(images)
    assert left is not None and left[:, 1:].sum(1).tolist() == [8, 8, 8]
    errors = (found - wanted)[:, 1:][left[:, 1:]].square()
    torch.testing.assert_close(loss.detach(), 2 * errors.mean())
    (first + loss).backward()
    assert moved(model) == {"predictor", "backbone"}


def test_a_student_that_leaves_tokens_out_in_one_command(data, teacher, tmp_path):
    out = tmp_path / "run"
    command = ["train", "--recipe", "sparsifiner", "--teacher", str(teacher), "--data", str(data), "--epochs", "3"]
    command += ["--batch-size", "4", "--set", "keep_tokens=[1.0, 0.5]", "--out", str(out)]
    assert main(command) == 0
    assert json.loads((out / "best.json").read_text())["model"]["keep_tokens"] == [1.0, 0.5]
    assert main(["predict", str(out), str(data / "a" / "0.png")]) == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((None, "there"), "need the recipe's name: pass --recipe sparsifiner"),
        (("sparsfiner", "there"), "unknown recipe 'sparsfiner'; did you mean 'sparsifiner'"),
        (("sparsifiner", None), "--recipe sparsifiner needs --teacher"),
    ],
)
def test_a_recipe_that_is_not_all_there(asked, says):
    with pytest.raises(ConfigError, match=says):
        choose_recipe({}, *asked, {})


def test_a_recipe_from_a_file_and_from_the_command_line():
    file = {"kind": "sparsifiner", "teacher": "here", "logits": 1.0, "tokens": 0.0}
    chosen = choose_recipe(file, None, None, {"tokens": 2.0})
    assert chosen is not None and str(chosen.teacher) == "here"
    assert (chosen.options.logits, chosen.options.tokens, chosen.options.labels) == (1.0, 2.0, 1.0)
    with pytest.raises(ConfigError, match=r"recipe.*'logit'.*'logits'"):
        choose_recipe({**file, "logit": 1.0}, None, None, {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reconstruction_epochs": 0}, r"\(reconstruction_epochs=0\): must be >= 1"),
        ({"reconstruction_lr": 0.0}, r"\(reconstruction_lr=0.0\): must be > 0"),
        ({"reconstruction": -1.0}, r"\(reconstruction=-1.0\): must be > 0"),
        ({"tokens": -1.0}, r"\(tokens=-1.0\): must be >= 0"),
        ({"labels": 0.0, "logits": 0.0, "tokens": 0.0}, "at least one must be > 0"),
    ],
)
def test_options_that_cannot_be(changes, says):
    with pytest.raises(ConfigError, match=says):
        SparsifyingOptions(**changes)


def test_phases_share_the_epochs():
    def phases(**options):
        lengths = SparsifyingOptions(**options).phases(TrainOptions(epochs=20, lr=1e-3))
        return [(phase.epochs, phase.lr, phase.warmup) for phase in lengths]

    assert phases() == [(2, 3.75e-3, 0.2), (18, 1e-3, 1.8)]
    assert phases(reconstruction_epochs=12, reconstruction_lr=0.1) == [(12, 0.1, 1.2), (8, 1e-3, 0.8)]
    with pytest.raises(ConfigError, match="reconstruction_epochs=20 leaves none of epochs=20"):
        phases(reconstruction_epochs=20)


def test_what_does_not_go_with_a_teacher(data, teacher, make_folder, tmp_path, capsys):
    def refused(*arguments, of=teacher):
        command = ["train", "--recipe", "sparsifiner", "--teacher", str(of), *arguments, "--out", str(tmp_path / "no")]
        assert main(command) == 2
        return capsys.readouterr().err

    assert "tells 2 classes apart (a, b)" in refused()
    assert "--img-size 16x16" in refused("--data", str(data), "--img-size", "32")
    more = refused("--data", str(data), "--img-size", "16", "--model", "sparsifiner_micro")
    assert "differs from its teacher vit_micro in more than its attention" in more
    given = ("--data", str(data), "--img-size", "16", "--set", "depth=2")
    assert "the model has no mask predictors that --recipe sparsifiner could train" in refused(
        *given, "--model", "vit_micro"
    )
    two = "mix.groups=[{kind: mask_predictor, heads: 2, tokens: 16, keep: 0.5, prefix: 1}, {kind: dense, heads: 1}]"
    assert "the model's head groups, of 2, 1, 2, 1 heads, are not those of its teacher vit_micro, of 3, 3" in refused(
        *given, "--model", "vit_micro", "--set", two
    )
    assert "leaves none of epochs=1" in refused("--data", str(data), "--epochs", "1")
    assert "there is no checkpoint" in refused("--data", str(data), of=tmp_path / "nowhere")
    command = ["train", "--model", "bigbird_vit_micro", "--img-size", "16", "--data", str(data), *SMALL]
    assert main([*command, "--out", str(tmp_path / "bird")]) == 0
    assert "a teacher is an isotropic model with dense heads" in refused("--data", str(data), of=tmp_path / "bird")
