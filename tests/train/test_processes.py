"""Two processes on the CPU train one model, and count every test image once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnkit_models.train.folder import image_folder
from attnkit_models.train.predict import load_classifier

ROOT = Path(__file__).parents[2]


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command = [sys.executable, *launcher, "--master_port", str(port), "-m", "attnkit.cli", *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names Linux's loopback interface")
def test_two_processes(make_folder, tmp_path):
    data, out = make_folder(a=14, b=14, c=14), tmp_path / "run"
    config = tmp_path / "tiny.yaml"
    # The mask predictor's parameters get no gradient, which data parallelism has to be told.
    config.write_text("{kind: sparsifiner_micro, drop_path: 0.1}", encoding="utf-8")
    command = ["train", "--config", config, "--data", data, "--img-size", 16, "--batch-size", 4]
    command += ["--epochs", 2, "--warmup", 1, "--out", out]
    done = launch(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, each on the CPU" in done.stdout
    assert done.stdout.count("epoch 1/2") == 1

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    # Nine test images in batches of four: the last batch is padded, and the padding must not count.
    images = image_folder(data, (16, 16))
    assert len(images.val) == 9
    classifier = load_classifier(out / "last.safetensors")
    with torch.no_grad():
        logits = classifier.model(images.preprocess.normalise(images.val.pixels.float() / 255))
    loss = torch.nn.functional.cross_entropy(logits, images.val.labels).item()
    right = (logits.argmax(1) == images.val.labels).float().mean().item()
    assert records[-1]["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert records[-1]["val_accuracy"] == pytest.approx(right, abs=1e-6)

    assert "Warning" not in done.stderr

    before = (out / "last.safetensors").read_bytes()
    (out / "metrics.jsonl").unlink()
    resumed = launch(*command, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed after epoch 2/2" in resumed.stdout
    assert (out / "last.safetensors").read_bytes() == before
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names Linux's loopback interface")
def test_convolutions_over_tokens_are_trained_without_a_warning(make_folder, tmp_path):
    command = ["train", "--model", "bigbird_vit_micro", "--baseline", "biformer_micro", "--epochs", 1]
    done = launch(*command, "--data", make_folder(a=5, b=5), "--img-size", 16, "--batch-size", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names Linux's loopback interface")
def test_a_batch_that_two_processes_cannot_share(make_folder, tmp_path):
    done = launch(
        "train", "--model", "vit_micro", "--batch-size", 5, "--data", make_folder(a=5, b=5), "--out", tmp_path
    )
    assert done.returncode != 0
    # Each process says it in one line; the rest is the launcher's report about them.
    assert done.stderr.count("error: ") == done.stderr.count("error (process 1): ") == 1
    assert "attnkit_models" not in done.stderr
    assert "batch_size=5 cannot be divided among 2 processes; choose a multiple, such as 4" in done.stderr
