"""The parts of training that can be looked at alone."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from rich.console import Console

import attnkit
from attnkit_models.train.data import digits
from attnkit_models.train.memory import PeakMemory
from attnkit_models.train.optimize import adamw, learning_rate
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.pictures import draw_attention, draw_curves, predicted
from attnkit_models.train.progress import Reporter
from attnkit_models.train.seeds import seed_of


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, steps=100, warmup=10, peak=1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert learning_rate(0, steps=1, warmup=0, peak=1.0) == 1.0


def test_weight_decay_spares_vectors_and_what_the_model_names():
    model = attnkit.build("vit_micro", num_classes=3, img_size=16)
    optimizer = adamw(model, TrainOptions(weight_decay=0.3))
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named)
    for name, parameter in named.items():
        spared = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    assert "pos_embed" in model.no_weight_decay() and "pos_embed" in named


def test_seeds_differ_and_stay():
    assert seed_of("order", 0, 1) == seed_of("order", 0, 1)
    seeds = {seed_of(what, seed, epoch) for what in ("a", "b") for seed in range(5) for epoch in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)


def test_peak_memory_sees_what_came_and_went():
    memory = PeakMemory(torch.device("cpu"))
    if not memory.exact:
        pytest.skip("this system cannot start its count anew")
    before = memory.megabytes()
    torch.ones(20_000_000)
    assert before < 60 < memory.megabytes() < 200
    assert PeakMemory(torch.device("cpu")).megabytes() < 60


def test_peak_memory_without_a_count_that_starts_anew(monkeypatch, tmp_path):
    monkeypatch.setattr("attnkit_models.train.memory._RESET", tmp_path / "missing" / "clear_refs")
    memory = PeakMemory(torch.device("cpu"))
    assert not memory.exact and memory.unit == "whole process"
    assert memory.megabytes() > 50


def test_curves_are_named_with_the_fields_terms(tmp_path):
    history = [{"epoch": at, "train_loss": 1 / at, "val_accuracy": 1 - 1 / at} for at in (1, 2, 3)]
    figure = draw_curves({"a": history, "b": history[:1]}, tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in figure.axes] == ["cross-entropy", "accuracy"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["a", "b"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_picture_of_attention_names_the_true_and_the_predicted_class(tmp_path):
    data = digits((16, 16))
    model = attnkit.build("vit_micro", num_classes=10, img_size=16, in_chans=1).eval()
    # Whatever it sees, this model calls it a 3.
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(20.0 * torch.nn.functional.one_hot(torch.tensor(3), 10))
    figure = draw_attention(model, data, tmp_path / "attention.png")
    first = data.val.pixels[:64].float() / 255
    contrast = first.diff(dim=-1).abs().sum((1, 2, 3)) + first.diff(dim=-2).abs().sum((1, 2, 3))
    label = int(data.val.labels[int(contrast.argmax())])
    assert figure.texts[0].get_text() == f"true class {label}, predicted 3 (100 %)"
    assert predicted(model, torch.zeros(1, 1, 16, 16), ["long name " * 9] * 10) == "predicted long name long … (100 %)"


def test_a_bar_in_a_terminal_and_plain_lines_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal, as CI is one, gets plain lines too
    record = {"epoch": 2, "train_loss": 0.5, "val_accuracy": 0.875, "seconds": 1.25}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        reporter = Reporter(console=console)
        with reporter.training("tiny", images=100, done=20):
            reporter.tick(30)
            reporter.epoch("tiny", record, 10)
        text = console.file.getvalue()
        assert "tiny  epoch  2/10  loss 0.5000  test accuracy  87.50%  1.25 s" in text
        assert ("images/s" in text and "left" in text and "50 %" in text) == terminal
        assert list(reporter.track([1, 2], 2)) == [1, 2]


def test_other_processes_keep_quiet(capsys):
    reporter = Reporter(main=False)
    reporter.say("hello")
    with reporter.training("tiny", images=10, done=0):
        reporter.tick(5)
    assert capsys.readouterr().out == ""
