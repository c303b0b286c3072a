"""explain: one row per call with the backend it got and a reason for every other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnkit
from attnkit import Grid, HeadMix
from attnkit.errors import BackendError, ConfigError
from attnkit.kernels import costs
from attnkit.registry import BACKENDS

MIX = [attnkit.Conv(heads=2), attnkit.RandomWindow(heads=2, window=49), attnkit.CrossShaped(heads=2, stripe=2)]


def test_every_call_has_a_row():
    found = attnkit.explain(HeadMix(96, MIX), 14)
    assert [(row.path, row.kind, row.heads) for row in found.rows] == [
        ("groups.1", "random_window", 2),
        ("groups.2", "cross_shaped", 1),
        ("groups.2", "cross_shaped", 1),
    ]
    assert found.others == (("groups.0", "conv"),)
    row = found.rows[0]
    assert (row.queries, row.keys, row.density, row.layout) == (196, 196, 0.25, "blocks")
    assert row.backend in BACKENDS


def test_every_other_backend_has_a_reason():
    for row in attnkit.explain(HeadMix(96, MIX), 14).rows:
        assert set(row.reasons) == set(BACKENDS) - {row.backend}
        assert all(reasons and all(reasons) for reasons in row.reasons.values())


def test_a_preference_shows():
    with attnkit.use_backend("reference"):
        found = attnkit.explain(HeadMix(96, MIX), (6, 9))
    assert {row.backend for row in found.rows} == {"reference"}
    assert "'reference' was asked for" in str(found)


def test_a_preference_that_cannot_run_raises_as_the_model_would():
    mix = HeadMix(32, [attnkit.LearnedQuery(heads=2, kernel=3)])
    with attnkit.use_backend("sdpa"), pytest.raises(BackendError, match="gain"):
        attnkit.explain(mix, 6)


def test_training_is_explained_on_demand():
    mix = HeadMix(96, MIX).eval()
    reasons = attnkit.explain(mix, 8, training=True).rows[0].reasons["flex"]
    assert any("backward" in reason for reason in reasons)
    assert not mix.training and int(mix.draws) == 0


def test_prefix_tokens_and_whole_models():
    found = attnkit.explain(HeadMix(32, [attnkit.Window(heads=2, window=3)]), Grid(6, 9, prefix=2))
    assert found.rows[0].queries == 56
    rows = attnkit.explain(attnkit.build("vit_micro", img_size=32), (32, 32)).rows
    assert len(rows) == 4 and rows[-1].path == "blocks.3.mix.groups.0"


def test_other_modules_may_attend_too():
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2).transpose(1, 2)[:, None]
            return attnkit.attend(rows, rows, rows, attnkit.layouts.Dense(rows.shape[2]))

    found = attnkit.explain(nn.Sequential(nn.Conv2d(3, 8, 1), Own()), 4)
    assert [(row.path, row.kind, row.queries) for row in found.rows] == [("1", "Own", 16)]


def test_a_copy_answers_for_another_dtype():
    mix = HeadMix(32, [attnkit.Window(heads=2, window=3)])
    found = attnkit.explain(mix, 6, dtype=torch.float64)
    assert "float64" in found.title
    assert mix.qkv.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="no_such_device"):
        attnkit.explain(mix, 6, device="no_such_device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_no_times_are_told_where_none_were_measured(dtype):
    mix = HeadMix(32, [attnkit.Window(heads=2, window=3)])
    found = attnkit.explain(mix, 6, dtype=dtype)
    assert found.rows[0].milliseconds is None and not found.beside
    assert any("it could run; no times were measured" in one for (one, *_) in found.rows[0].reasons.values())
    assert " ms" not in str(found).replace("backend  ms", "")
    assert attnkit.explain(mix, 6).rows[0].milliseconds


def test_a_kernel_without_measurements_takes_no_time_that_is_told(monkeypatch):
    """As Triton's interpreter."""
    monkeypatch.setattr("attnkit.kernels.sdpa.SdpaBackend.work", lambda self, call: costs.Work("new", {"calls": 1.0}))
    mix = HeadMix(32, [attnkit.Window(heads=2, window=3)])
    with attnkit.use_backend("sdpa"):
        row = attnkit.explain(mix, 6).rows[0]
    assert (row.backend, row.milliseconds) == ("sdpa", None)
    with attnkit.use_backend("gather"):
        row = attnkit.explain(mix, 6).rows[0]
    assert row.milliseconds
    assert row.reasons["sdpa"] == ("it could run; no times were measured to compare it by, but 'gather' was asked for",)


def test_it_leaves_no_mark():
    model = attnkit.build("bigbird_vit_micro", img_size=16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    attnkit.explain(model, 16, training=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(one.grad is None for one in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one in model.modules():
        assert not one._forward_hooks and not one._forward_pre_hooks
    mixes = [one for one in model.modules() if isinstance(one, HeadMix)]
    assert mixes and all(mix._draws.pending == 0 for mix in mixes)


def test_the_text_says_what_ran_and_groups_like_reasons():
    text = str(attnkit.explain(attnkit.build("vit_micro", img_size=32), 32))
    assert "4 attention calls" in text.splitlines()[0]
    assert "# 1-4" in text
    assert text.count("xformers has attention for cuda only") == 1
    assert "<table>" in attnkit.explain(HeadMix(96, MIX), 6)._repr_html_()


def test_a_compiled_module_is_explained_without_compiling():
    mix = torch.compile(HeadMix(32, [attnkit.Window(heads=2, window=3)]), backend="eager")
    assert len(attnkit.explain(mix, 6).rows) == 1
