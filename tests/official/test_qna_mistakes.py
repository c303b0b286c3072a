"""Arguments of QnA's authors: what is unknown, does not fit or has no counterpart is one sentence."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.errors import CheckpointError, ConfigError, ShapeError
from attnkit_models import export_official, import_official, import_official_layer

LAYER = {"features": 8, "heads": 2, "kernel_size": 3, "stride": 1, "padding": 1}


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("FusedKQnA", {"kernel": 3}, r"unknown option 'kernel' for 'FusedKQnA'; did you mean 'kernel_size'\?"),
        (
            "FusedKQnA",
            {"attn_scale": "norml"},
            "must be one of 'normal', .*; did you mean 'normal'",
        ),
        ("FusedKQnA", {"pos_embedding_type": "absolute_pos"}, "must be one of 'relative_pos', 'none'"),
        ("FusedKQnA", {"heads": 3}, "features=8: must divide into heads=3"),
        ("FusedKQnA", {"heads": "2"}, "heads must be an integer, but got '2'"),
        ("FusedKQnA", {"kernel_size": 4}, "kernel_size=4: must be odd"),
        ("FusedKQnA", {"padding": 0}, "padding=0: .*kernel_size=3 needs 1"),
        (
            "FusedKQnA",
            {"attn_scale": "posneg", "n_queries": 1, "heads": 1},
            "attn_scale='posneg': 1 queries of",
        ),
        ("QnAUpsample", {"scale": 2, "n_queries": 3}, r"n_queries=3: every output has one, so there are .* = 4"),
        ("QnAUpsample", {"scale": 2, "stride": 3}, "stride=3: a map that becomes scale=2 times finer"),
        ("QnAUpsample", {"scale": 2, "attn_scale": "posneg"}, "attn_scale='posneg': nothing is taken away"),
        ("QnABlock", {"out_features": 3}, "unknown option 'out_features' for 'QnABlock'"),
        ("MultiHeadSelfAttention", {"kernel_size": 3}, "unknown option 'kernel_size' for 'MultiHeadSelfAttention'"),
    ],
)
def test_arguments_of_layers(name, changes, says):
    with pytest.raises(ConfigError, match=says):
        import_official_layer(name, {"Wk": torch.zeros(8, 8)}, {**LAYER, **changes})


def test_arguments_that_are_missing():
    with pytest.raises(ConfigError, match="option 'heads' of 'FusedKQnA' is missing; it is an integer"):
        import_official_layer("FusedKQnA", {"Wk": torch.zeros(8, 8)}, {"features": 8, "kernel_size": 3})
    with pytest.raises(ConfigError, match=r"use_relative_pe=True.*: needs window_size"):
        import_official_layer("MultiHeadSelfAttention", {"x": torch.zeros(1)}, {"features": 8, "heads": 2})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qna_layer": [1]}, r"unknown option 'qna_layer'.*; did you mean 'qna_layers'\?"),
        ({"qna_heads": [8, 16, 32]}, r"qna_heads=\[8, 16, 32\]: needs one entry for each of 4 stages"),
        ({"lsa_heads": [3, 4, 8, 16]}, r"lsa_heads=\[3, 4, 8, 16\]: 64 channels do not divide into 3 heads"),
        ({"stem_type": "resnet"}, "config.stem_type must be one of 'patch', but got 'resnet'"),
        ({"classification_head_type": "qnav1"}, "must be one of 'gap'"),
    ],
)
def test_arguments_of_models(changes, says):
    with pytest.raises(ConfigError, match=says):
        import_official("qna_vit", {"x": torch.zeros(1)}, {"num_classes": 5, "config": changes})


def test_arguments_without_effect_are_accepted():
    config = {"base_dim": 8, "qna_heads": [1, 2, 4, 8], "lsa_layers": [0, 0, 0, 0], "qna_normalize_q": [True] * 4}
    config |= {"lsa_heads": [1, 1, 1, 1]}
    hparams = {"num_classes": 5, "img_size": 64, "config": config}
    plain = export_official("qna_vit", import_fresh(hparams))
    more = {"mlp_ratio": 2, "activation_fn": "relu", "lsa_attention_dropout": 0.1, "drop_path_downsample": True}
    found = import_official("qna_vit", plain, {**hparams, "config": {**config, **more}, "train": False, "dtype": None})
    assert all(torch.equal(one, plain[key]) for key, one in export_official("qna_vit", found).items())


def import_fresh(hparams):
    from attnkit_models.checkpoints.qna_arguments import qna_config

    return attnkit.build(qna_config(hparams))


def test_a_model_without_classes_ends_with_its_map():
    config = {"n_stages": 2, "base_dim": 8, "lsa_layers": [0, 0], "lsa_heads": [1, 1], "qna_heads": [1, 2]}
    hparams = {"num_classes": 0, "config": config}
    model = import_fresh(hparams)
    state = export_official("qna_vit", model)
    assert not any(key.startswith("ClassificationHead") for key in state)
    again = import_official("qna_vit", state, hparams)
    assert again(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)


def test_layers_that_are_given_something_else():
    state = {"to_qkv.kernel": torch.zeros(8, 24), "to_out.kernel": torch.zeros(8, 8)}
    state["RelativePositionalEmbedding_0.rpe_bias"] = torch.zeros(9, 2)
    layer = import_official_layer("MultiHeadSelfAttention", state, {"features": 8, "heads": 2, "window_size": 2})
    with pytest.raises(ShapeError, match=r"a window of 2 x 2 holds 4 tokens, not 5"):
        layer(torch.zeros(1, 5, 8))
    with pytest.raises(ShapeError, match=r"takes \(windows \* B, tokens of a window, C\), but got \(1, 2, 2, 8\)"):
        layer(torch.zeros(1, 2, 2, 8))
    for name in ("FusedKQnA", "QnABlock", "qna_vit"):
        with pytest.raises(CheckpointError, match=f"cannot be written as a '{name}' of its authors"):
            export_official(name, layer)
    with pytest.raises(CheckpointError, match=r"1 is missing \(to_out.kernel\); 1 is not known \(to_out.weight\)"):
        wrong = {**state, "to_out.weight": state["to_out.kernel"]}
        del wrong["to_out.kernel"]
        import_official_layer("MultiHeadSelfAttention", wrong, {"features": 8, "heads": 2, "window_size": 2})
