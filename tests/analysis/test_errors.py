"""Whatever is passed to the functions of analysis, a sentence of attnkit's own answers what cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnkit
from attnkit import Grid, HeadMix, layouts
from attnkit.analysis import draw_attention, reach
from attnkit.errors import AttnkitError, ConfigError, ShapeError

MIX = HeadMix(8, [attnkit.Dense(2)])
MODEL = attnkit.build("vit_micro", img_size=16)
LAYOUT = layouts.Blocks.windows(Grid(4, 4), 2)

WRONG = [True, -1, 0, 10**9, 10**40, 1.5, float("nan"), "x", "", (), {}, [[]], ("a", "b"), object(), Grid(2, 2, 2)]
WRONG += [torch.ones(4, 4).numpy(), torch.tensor(3), torch.ones(4, 4), nn.Linear(2, 2), layouts.Dense(5), Grid]

# Function, its good arguments, and which one is wrong.
CALLS = [
    (attnkit.draw, {"what": attnkit.Window(2, 2), "grid": 4}, ("what", "grid", "path", "query")),
    (attnkit.draw, {"what": LAYOUT, "grid": Grid(4, 4)}, ("grid", "path", "query")),
    (attnkit.explain, {"model_or_layer": MIX, "image_size": 4}, ("model_or_layer", "image_size", "training", "dtype")),
    (attnkit.explain, {"model_or_layer": MODEL, "image_size": 16}, ("image_size", "device")),
    (attnkit.flops, {"model": MIX, "image_size": 4}, ("model", "image_size", "device", "dtype")),
    (attnkit.flops, {"model": MODEL, "image_size": 16}, ("image_size",)),
    (reach, {"model_or_mix": [attnkit.Dense(2)], "grid": 4}, ("model_or_mix", "grid", "layers")),
    (reach, {"model_or_mix": MODEL, "grid": 16}, ("grid", "layers")),
    (draw_attention, {"model": MODEL, "image": torch.zeros(3, 16, 16)}, ("model", "image", "path", "layers", "query")),
    (draw_attention, {"model": MODEL, "image": torch.zeros(3, 16, 16)}, ("picture",)),
]


@pytest.mark.parametrize(
    ("function", "good", "name"),
    [(function, good, name) for function, good, names in CALLS for name in names],
    ids=lambda one: (
        getattr(one, "__name__", one) if not isinstance(one, dict) else type(next(iter(one.values()))).__name__
    ),
)
def test_a_wrong_value_is_answered_by_a_sentence(function, good, name):
    refused = 0
    for wrong in WRONG:
        try:
            function(**{**good, name: wrong})
        except AttnkitError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 400
            refused += 1
    assert refused >= len(WRONG) - 3


def test_sizes_that_no_memory_holds():
    for call in (attnkit.explain, attnkit.flops, reach):
        with pytest.raises(ShapeError, match=r"1000000000 makes an input of .* numbers, which is too large"):
            call(MODEL, 10**9)
        with pytest.raises(ShapeError, match="too large"):
            call(MIX, (10**9, 10**9))
    with pytest.raises(ShapeError, match=r"draw shows up to 65536 tokens, but got Grid\(257, 256\)"):
        attnkit.draw(attnkit.Window(2, 2), (257, 256))


def test_a_dtype_as_text():
    for call in (attnkit.explain, attnkit.flops):
        with pytest.raises(
            ConfigError, match=r"needs a floating dtype, such as torch\.bfloat16, but got dtype='float32'"
        ):
            call(MIX, 4, dtype="float32")
        with pytest.raises(ConfigError, match=r"but got dtype=torch\.int64"):
            call(MIX, 4, dtype=torch.int64)
        with pytest.raises(ConfigError, match=r"cannot bring the model to device='gpu': "):
            call(MIX, 4, device="gpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 1, torch.device("cuda")], ids=str)
def test_a_gpu_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (attnkit.explain, attnkit.flops):
        with pytest.raises(ConfigError) as caught:
            call(MIX, 4, device=device)
        said = f"cannot bring the model to device={device!r}: PyTorch finds no GPU that it can use (`attnkit doctor` "
        assert str(caught.value) == f"{call.__name__} {said}tells more); without device= it stays where it is"


def test_a_device_that_no_pytorch_knows():
    for wrong in ("gpu", "{0}", 10**40):
        with pytest.raises(ConfigError, match=r"cannot bring .*; without device= it stays where it is$"):
            attnkit.explain(MIX, 4, device=wrong)


def test_modules_that_cannot_run_on_what_they_get():
    for call in (attnkit.explain, attnkit.flops, lambda model, size: draw_attention(model, torch.zeros(3, size, size))):
        with pytest.raises(ShapeError, match=r"ran Linear on torch\.float32 \(1, 3, 7, 7\), and it failed: ") as caught:
            call(nn.Linear(2, 2), 7)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_faults_of_a_module_stay_what_they_are():
    class Faulty(nn.Module):
        def forward(self, x):
            return x.no_such_thing

    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("all used")

    with pytest.raises(AttributeError, match="no_such_thing"):
        attnkit.flops(Faulty(), 4)
    with pytest.raises(torch.OutOfMemoryError):
        attnkit.flops(Full(), 4)


def test_a_path_is_looked_at_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr("attnkit.analysis.pictures.picture_rows", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr("attnkit.analysis.attention.visits", lambda *_: pytest.fail("run"))
    for path, words in ((3, "to a path such as 'window.png', but got 3"), ("a.gif", "'a.gif'")):
        with pytest.raises(ConfigError, match=words):
            attnkit.draw(attnkit.Window(2, 2), 4, path)
        with pytest.raises(ConfigError, match=words):
            draw_attention(MODEL, torch.zeros(3, 16, 16), path)
