"""One command from images to weights, metrics, pictures and predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from attnkit.cli import main
from attnkit_models.train.data import digits
from attnkit_models.train.loop import evaluate
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.predict import load_classifier
from attnkit_models.train.progress import Reporter
from attnkit_models.train.run import Choice, train

FILES = {
    "metrics.jsonl",
    "best.safetensors",
    "best.json",
    "last.safetensors",
    "last.json",
    "resume.safetensors",
    "attention.png",
}


def test_train_with_a_baseline_then_predict(make_folder, tiny_config, tmp_path, capsys):
    data = make_folder(red=9, green=9, blue=9)
    out = tmp_path / "run"
    command = ["train", "--config", str(tiny_config), "--baseline", "vit_micro", "--data", str(data)]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "21 images to train on, 6 to test with, 3 classes, 16 x 16 pixels" in printed
    # A model from a file goes by the file's name.
    assert "\ntiny  epoch 1/2" in printed and "pyramid" not in printed
    for row in ("test accuracy", "parameters", "MACs an image", "seconds an epoch", "peak memory"):
        assert row in printed
    assert str(out / "curves.png") in printed

    assert {path.name for path in out.iterdir()} == {"tiny", "vit_micro", "run.json", "curves.png", "comparison.json"}
    for label in ("tiny", "vit_micro"):
        assert {path.name for path in (out / label).iterdir()} == FILES
        records = [json.loads(line) for line in (out / label / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [1, 2]
        for record in records:
            assert {"train_loss", "val_accuracy", "seconds", "lr", "peak_memory_mb"} <= set(record)
        header = json.loads((out / label / "last.json").read_text())
        assert header["classes"] == ["blue", "green", "red"]
        assert header["val_accuracy"] == records[-1]["val_accuracy"]
        with safe_open(out / label / "last.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["attnkit"]) == header
    table = json.loads((out / "comparison.json").read_text())
    assert [row["model"] for row in table] == ["tiny", "vit_micro"]
    assert all(row["macs"] > 0 and row["parameters"] > 0 and row["seconds_per_epoch"] > 0 for row in table)
    for picture in (out / "curves.png", out / "tiny" / "attention.png"):
        with Image.open(picture) as opened:
            assert min(opened.size) > 100

    image = data / "red" / "0.png"
    assert main(["predict", str(out), str(image), str(image), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith(f"{image}: ") and lines[0].count("%") == 2
    bad = [str(tmp_path / "nowhere.png"), str(out / "run.json")]
    assert main(["predict", str(out), bad[0], str(image), bad[1], str(image)]) == 1
    output = capsys.readouterr()
    assert [line.split(": ")[0] for line in output.out.splitlines()] == [str(image)] * 2
    for line, path in zip(output.err.splitlines(), bad, strict=True):
        assert line.startswith("error: ") and path in line
    assert main(["draw", str(out), "--image", str(image), "--out", str(tmp_path / "seen.png")]) == 0
    assert (tmp_path / "seen.png").is_file()


def test_a_checkpoint_alone_gives_the_trained_model(tmp_path):
    choice = Choice("small", "bigbird_vit_micro", {"stages[*].depth": 1})
    options = TrainOptions(epochs=1, warmup=0.5, batch_size=128, img_size=16)
    [summary] = train([choice], out=tmp_path, options=options, reporter=Reporter(main=False))
    moved = tmp_path / "elsewhere" / "weights.safetensors"
    moved.parent.mkdir()
    (tmp_path / "last.safetensors").rename(moved)
    classifier = load_classifier(moved)
    data = digits((16, 16))
    images = classifier.preprocess.normalise(data.val.pixels.float() / 255)
    with torch.no_grad():
        right = (classifier.model(images).argmax(1) == data.val.labels).float().mean().item()
    assert right == pytest.approx(summary.progress.history[-1]["val_accuracy"], abs=1e-6)
    assert right > 0.2
    # A single model writes into the folder itself, and leaves test images to try.
    assert (tmp_path / "best.safetensors").is_file()
    [likeliest] = classifier(tmp_path / "samples" / "7.png", top=1)
    assert likeliest[0] in classifier.classes and 0 < likeliest[1] <= 1


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(make_folder, tmp_path):
    data = make_folder(a=6, b=6)
    weights = []
    for run, seed in enumerate((3, 3, 4)):
        options = TrainOptions(epochs=1, warmup=0.5, batch_size=4, img_size=16, seed=seed)
        out = tmp_path / f"run{run}"
        train([Choice("vit", "vit_micro")], out=out, data=data, options=options, reporter=Reporter(main=False))
        weights.append((out / "last.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_accumulation_and_mixed_precision(make_folder, tmp_path, precision):
    data = make_folder(a=8, b=8)
    options = TrainOptions(
        epochs=2, warmup=1, batch_size=3, grad_accum=2, img_size=16, mixed_precision=precision, workers=1
    )
    [summary] = train(
        [Choice("vit", "vit_micro")], out=tmp_path / "run", data=data, options=options, reporter=Reporter(main=False)
    )
    # 12 images make two groups of 2 x 3: four optimizer steps in two epochs, the learning rate ending near its floor.
    assert summary.progress.epoch == 2
    state = load_state(tmp_path / "run" / "resume.safetensors")
    assert {float(value) for name, value in state.items() if name.startswith("optimizer/step/")} == {4.0}
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())


def load_state(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def test_accumulated_steps_equal_one_large_step(make_folder, tmp_path):
    data = make_folder(a=10, b=10)
    ends = []
    for batch, groups in ((8, 1), (2, 4)):
        options = TrainOptions(epochs=1, warmup=0, batch_size=batch, grad_accum=groups, img_size=16)
        out = tmp_path / f"run{groups}"
        train([Choice("vit", "vit_micro")], out=out, data=data, options=options, reporter=Reporter(main=False))
        ends.append(load_state(out / "last.safetensors"))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=2e-4, rtol=0, msg=name)


def test_evaluation_counts_every_image_once(make_folder, tmp_path, monkeypatch):
    counted = []

    def spy(setup):
        counted.append(sum(len(batch["label"]) for batch in setup.val_loader))
        return evaluate(setup)

    monkeypatch.setattr("attnkit_models.train.fit.evaluate", spy)
    options = TrainOptions(epochs=1, warmup=0.5, batch_size=4, img_size=16)
    data = make_folder(a=11, b=12)
    train([Choice("vit", "vit_micro")], out=tmp_path / "run", data=data, options=options, reporter=Reporter(main=False))
    assert counted == [5]
