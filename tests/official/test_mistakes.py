"""State dicts that do not fit: one error with the first few of each kind and a guess; nothing half-loaded."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.errors import CheckpointError, ConfigError
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.biformer import biformer_table
from attnkit_models.checkpoints.exchange import load


@pytest.fixture(scope="module")
def state():
    return export_official("biformer_tiny", attnkit.build("biformer_tiny"))


def test_what_is_missing_unknown_and_of_another_shape_is_told_at_once(state):
    spoiled = dict(state)
    for key in ("norm.weight", "head.bias"):
        del spoiled[key]
    spoiled["norm.wieght"] = state["norm.weight"]
    spoiled["head.weight"] = torch.zeros(10, 512)
    spoiled["norm.bias"] = torch.zeros(512, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        import_official("biformer_tiny", spoiled)
    assert str(caught.value) == (
        "the state dict for 'biformer_tiny' does not fit: 2 are missing (norm.weight, head.bias); "
        "1 is not known (norm.wieght); 1 has another shape (head.weight (10, 512) instead of (1000, 512)); "
        "1 has another dtype (norm.bias of torch.int64)"
    )


def test_another_family_is_guessed(state):
    with pytest.raises(CheckpointError, match=r"it looks like a state dict of 'biformer'$"):
        import_official("biformer_stl", state)
    with pytest.raises(CheckpointError, match=r"238 are not known \(downsample_layers.0.3.weight, .*, \.\.\.\)"):
        import_official("biformer_stl", state)


def test_nothing_is_half_loaded(state):
    model = attnkit.build("biformer_tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoiled = {**state, "head.weight": torch.zeros(10, 512), "norm.weight": torch.full((512,), 3.0)}
    with pytest.raises(CheckpointError):
        load(model, biformer_table(model.config), spoiled, what="it", family="biformer")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "wrapped", [lambda one: {"model": one, "epoch": 3}, lambda one: {"state_dict": {"model": one}}]
)
@pytest.mark.parametrize("parallel", [False, True])
def test_wrapped_checkpoints(state, wrapped, parallel):
    inner = {f"module.{key}": value for key, value in state.items()} if parallel else state
    again = export_official("biformer_tiny", import_official("biformer_tiny", wrapped(inner)))
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ([1, 2], "maps names to tensors, but got list"),
        ({}, "maps names to tensors, but it is empty"),
        ({"model": {"head.weight": "x"}}, "maps names to tensors, but 'head.weight' holds str"),
        ({3: torch.zeros(1)}, "maps names to tensors, but 3 holds Tensor"),
    ],
)
def test_no_state_dict(state_dict, message):
    with pytest.raises(CheckpointError, match=message):
        import_official("biformer_tiny", state_dict)


def test_names_and_arguments(state):
    with pytest.raises(ConfigError, match="unknown official model 'biformer_tinny'; did you mean 'biformer_tiny'"):
        import_official("biformer_tinny", state)
    with pytest.raises(ConfigError, match="'biformer_tiny' is a released model and takes no hparams; give them with"):
        import_official("biformer_tiny", state, {"depth": [1]})
    with pytest.raises(ConfigError, match="'biformer' is a family and needs hparams, or give a released"):
        import_official("biformer", state)
    with pytest.raises(ConfigError, match="unknown official layer 'Attn'"):
        import_official_layer("Attn", state)


@pytest.mark.parametrize("hparams", [(1, 2), 5, "depth=1", {3: 4}])
def test_no_arguments(state, hparams):
    for name in ("biformer", "qna_vit"):
        with pytest.raises(ConfigError, match="hparams maps the names of the constructor's arguments to values, but"):
            import_official(name, state, hparams)
    with pytest.raises(ConfigError, match="hparams maps the names of the constructor's arguments to values, but"):
        import_official_layer("Attention", state, hparams)


def test_a_long_name_is_no_wall_of_text():
    with pytest.raises(CheckpointError) as error:
        import_official("biformer_tiny", {"a" * 10_000: 3})
    assert len(str(error.value)) < 300


def test_models_of_another_kind_cannot_be_written():
    for model in (attnkit.build("vit_micro"), torch.nn.Linear(2, 2)):
        with pytest.raises(CheckpointError, match="cannot be written as a 'biformer' of its authors"):
            export_official("biformer_tiny", model)
    with pytest.raises(ConfigError, match=r"unknown official model \[3\]"):
        export_official([3], attnkit.build("vit_micro"))


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("biformer_small", "biformer_tiny", "its depths are [2, 2, 8, 2], but those of 'biformer_small' are [4, 4, 18"),
        ("biformer_base", "biformer_small", "its widths are [64, 128, 256, 512], but those of 'biformer_base' are [96"),
        (
            "sparsifiner_deit_base",
            "sparsifiner_deit_tiny",
            "its widths are [192], but those of 'sparsifiner_deit_base'",
        ),
        ("qna_vit_small", "qna_vit_tiny", "but those of 'qna_vit_small' are"),
        ("biformer_tiny", "vit_micro", "cannot be written as a 'biformer' of its authors: it is of kind 'isotropic'"),
        ("sparsifiner_deit_tiny", "biformer_micro", "as a 'sparsifiner' of its authors: "),
        ("biformer_tiny", "bigbird_vit_micro", "cannot be written as a 'biformer' of its authors: "),
    ],
)
def test_a_model_of_another_shape_is_not_written_as_a_released_one(name, make, says):
    with torch.device("meta"):
        model = attnkit.build(make)
    with pytest.raises(CheckpointError) as caught:
        export_official(name, model)
    assert says in str(caught.value) and '"' not in str(caught.value)


def test_other_classes_and_image_sizes_are_written():
    state = export_official("biformer_tiny", attnkit.build("biformer_tiny", num_classes=5, img_size=64))
    assert state["head.weight"].shape == (5, 512)


@pytest.mark.parametrize("name", ["vit_small", "bigbird_vit_tiny", "biformer_micro"])
def test_models_without_official_weights(state, name):
    with pytest.raises(ConfigError, match=f"^attnkit has '{name}', but there are no official weights of it"):
        import_official(name, state)
    with pytest.raises(ConfigError, match="there are no official weights of it"):
        export_official(name, attnkit.build("biformer_micro"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda one: one.to("meta"), "1 is sparse or without values (norm.bias)"),
        (lambda one: one.to_sparse(), "1 is sparse or without values (norm.bias)"),
        (lambda one: one.to(torch.complex64), "1 has another dtype (norm.bias of torch.complex64)"),
    ],
)
def test_tensors_that_could_only_be_copied_in_part(state, changed, said):
    model = attnkit.build("biformer_tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(
            model,
            biformer_table(model.config),
            {**state, "norm.bias": changed(state["norm.bias"])},
            what="it",
            family="",
        )
    assert said in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_that_contains_itself(state):
    whole = {"state_dict": state}
    whole["model"] = whole
    with pytest.raises(CheckpointError, match="maps names to tensors, but 'state_dict' holds dict"):
        import_official("biformer_tiny", whole)


@pytest.mark.parametrize("name", [None, 3, {}, ["biformer"], "a" * 10_000])
def test_names_that_are_none(state, name):
    for load_it in (import_official, import_official_layer):
        with pytest.raises(ConfigError, match="unknown official") as caught:
            load_it(name, state)
        assert len(str(caught.value)) < 500
