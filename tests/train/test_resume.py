"""A killed run continues to the same weights, and --resume never mixes two runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnkit.cli import main
from attnkit.errors import CheckpointError
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.progress import Reporter
from attnkit_models.train.run import Choice, train

OPTIONS = TrainOptions(epochs=1, warmup=0, batch_size=8, img_size=16)
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_reaches_the_same_weights(make_folder, tmp_path):
    data = make_folder(a=12, b=12, c=12)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interrupted.py"), data, tmp_path / "runs"],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same after") == 13


@pytest.fixture
def finished(make_folder, tmp_path):
    """Trains a small ViT for an epoch; call it again with changes to start over in the same folder."""
    data = make_folder(a=5, b=5)
    out = tmp_path / "run"

    def run(label="vit_micro", options=OPTIONS, data=data, **flags):
        [summary] = train(
            [Choice(label, label)], out=out, data=data, options=options, reporter=Reporter(main=False), **flags
        )
        return summary.progress

    run()
    return run, out


def test_an_existing_run_is_not_overwritten_by_chance(finished):
    run, out = finished
    before = (out / "last.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"already holds a run .*--resume.*--overwrite.*another --out"):
        run(options=TrainOptions(epochs=1, warmup=0, batch_size=8, img_size=16, seed=1))
    assert (out / "last.safetensors").read_bytes() == before
    run(options=TrainOptions(epochs=1, warmup=0, batch_size=8, img_size=16, seed=1), overwrite=True)
    assert (out / "last.safetensors").read_bytes() != before


def test_resuming_a_finished_run_changes_nothing(finished):
    run, out = finished
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    assert run(resume=True).epoch == 1
    assert {name: (out / name).read_bytes() for name in before} == before


def test_another_number_of_workers_may_resume(finished):
    run, _ = finished
    assert run(resume=True, options=TrainOptions(epochs=1, warmup=0, batch_size=8, img_size=16, workers=1)).epoch == 1


def test_resume_refuses_other_settings_models_and_data(finished, make_folder):
    run, out = finished
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=r"options\.batch_size was 8 and is now 4, options\.lr was 0\.002 and is now"
    ):
        run(resume=True, options=TrainOptions(epochs=1, warmup=0, batch_size=4, img_size=16, lr=0.1))
    with pytest.raises(CheckpointError, match="holds a run of vit_micro, not of bigbird_vit_micro"):
        run("bigbird_vit_micro", resume=True)
    with pytest.raises(CheckpointError, match=r"data\.fingerprint was"):
        run(resume=True, data=make_folder("others", a=5, b=6))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_resume_refuses_a_resume_file_of_another_model(finished):
    run, out = finished
    held = (out / "best.safetensors").read_bytes()
    (out / "resume.safetensors").write_bytes(held)
    with pytest.raises(CheckpointError, match=r"holds weights only and cannot continue a run"):
        run(resume=True)
    (out / "resume.safetensors").write_bytes(held[: len(held) // 2])
    with pytest.raises(CheckpointError, match="is not a safetensors checkpoint"):
        run(resume=True)


def test_nothing_to_resume_starts_anew_and_says_so(make_folder, tmp_path, capsys):
    data = make_folder(a=5, b=5)
    out = tmp_path / "new"
    command = ["train", "--model", "vit_micro", "--data", str(data), "--epochs", "1", "--img-size", "16"]
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"nothing to resume in {out}: starting from the beginning\n")
    for file in out.glob("*.*"):
        if file.name != "run.json":
            file.unlink()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    said = f"no epoch of the run in {out} was finished: starting from the beginning\n"
    assert capsys.readouterr().out.startswith(said)
    assert main([*command, "--out", str(out), "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert "starting from the beginning" not in resumed and "resumed after epoch 1/1" in resumed
    assert main([*command, "--out", str(out), "--resume", "--overwrite"]) == 2
    assert "pass only one of them" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_interrupted_by_hand_it_says_once_how_to_go_on(tmp_path, monkeypatch, capsys, rank):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnkit_models.train.run.train", interrupted)
    monkeypatch.setenv("RANK", rank)
    assert main(["train", "--model", "vit_micro", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.count("the same command with --resume goes on") == (rank == "0")


def test_overwrite_removes_the_models_of_the_old_run(make_folder, tmp_path):
    data = make_folder(a=5, b=5)
    for labels in (("vit_micro", "bigbird_vit_micro"), ("bigbird_vit_micro",)):
        train(
            [Choice(label, label) for label in labels],
            out=tmp_path / "run",
            data=data,
            options=OPTIONS,
            overwrite=True,
            reporter=Reporter(main=False),
        )
    assert not (tmp_path / "run" / "vit_micro").exists()
    assert (tmp_path / "run" / "best.safetensors").is_file()
