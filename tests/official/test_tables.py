"""Tables of other windows: resized as QnA's authors do for fine-tuning, by name and only where asked for."""

from __future__ import annotations

import math
import re

import pytest
import torch

import attnkit
from attnkit.errors import CheckpointError
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.qna_arguments import qna_config
from attnkit_models.checkpoints.tables import resized


def weights(old, new):
    """jax.image.resize's matrix (new, old) for one axis, with its cubic kernel and antialiasing."""
    scale = old / new
    wide = max(scale, 1.0)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for to in range(new):
        place = (to + 0.5) * scale - 0.5
        for at in range(old):
            x = abs(place - at) / wide
            if x < 1:
                matrix[to, at] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[to, at] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("old", [1, 3, 7, 13])
@pytest.mark.parametrize("new", [1, 3, 5, 27])
def test_resizing_is_that_of_jax(old, new):
    table = torch.randn(4, old, old, generator=torch.Generator().manual_seed(0))
    along = weights(old, new)
    expected = torch.einsum("yi,rij,xj->ryx", along, table.double(), along).float()
    torch.testing.assert_close(resized(table, (new, new)), expected)


def config(kernel, windows):
    inner = {"base_dim": 8, "qna_heads": [2, 4, 8, 16], "lsa_heads": [1, 2, 4, 8], "qna_layers": [1, 1, 1, 0]}
    inner |= {"qna_receptive_field": [kernel] * 4, "lsa_layers": [0, 0, 1, 1], "lsa_window": windows}
    return {"num_classes": 3, "config": inner}


def randomized(hparams):
    model = attnkit.testing.randomize_parameters(attnkit.build(qna_config(hparams)), seed=0)
    return export_official("qna_vit", model)


def by_square(table, side):
    """(places, rows) resized over the square of its places, in the authors' order."""
    old = math.isqrt(len(table))
    along = weights(old, side)
    found = torch.einsum("yi,ijr,xj->yxr", along, table.double().view(old, old, -1), along)
    return found.reshape(side * side, -1).float()


def test_a_model_at_other_windows():
    state = randomized(config(3, [7, 7, 4, 2]))
    model = import_official("qna_vit", state, config(5, [7, 7, 6, 3]), resize_tables=True)
    found = export_official("qna_vit", model)
    changed = set()
    for key, one in found.items():
        if one.shape == state[key].shape:
            assert torch.equal(one, state[key]), key
            continue
        changed.add(key.rpartition(".")[2])
        flat, given = (part.flatten(0, -2) for part in (one, state[key]))
        torch.testing.assert_close(flat, by_square(given, math.isqrt(len(flat))), msg=key)
    assert changed == {"rpe_bias", "attn_scale_weights"}
    assert model(torch.randn(1, 3, 48, 64)).isfinite().all()


def test_it_is_done_only_where_it_is_asked_for():
    state = randomized(config(3, [7, 7, 4, 2]))
    with pytest.raises(CheckpointError) as caught:
        import_official("qna_vit", state, config(3, [7, 7, 6, 2]))
    assert str(caught.value) == (
        "the state dict for 'qna_vit' does not fit: 1 has another shape "
        "(LSAStage_2.MSA_Block_1.MultiHeadSelfAttention_0.RelativePositionalEmbedding_0.rpe_bias (49, 4) instead of "
        "(121, 4)); these are tables of other windows or images, which resize_tables=True resizes"
    )
    del state["ClassificationHead_0.head_logits.bias"]
    with pytest.raises(CheckpointError, match=r"1 is missing \(ClassificationHead_0.head_logits.bias\)$"):
        import_official("qna_vit", state, config(3, [7, 7, 6, 2]), resize_tables=True)


def test_tables_that_no_resizing_fits():
    state = randomized(config(3, [7, 7, 4, 2]))
    key = "QnAStage_0.QnA_Block_1.FusedKQnA_0.rpe_bias"
    for wrong in (torch.zeros(8, 4), torch.zeros(25, 5), torch.zeros(25), torch.zeros(0, 4), torch.zeros(25, 4).long()):
        with pytest.raises(CheckpointError, match=re.escape(key)):
            import_official("qna_vit", {**state, key: wrong}, config(3, [7, 7, 4, 2]), resize_tables=True)


def test_a_layer_with_another_kernel():
    layer = {"features": 8, "heads": 2, "kernel_size": 3, "attn_scale": "ones"}
    fresh = attnkit.HeadMix(8, [attnkit.LearnedQuery(2, 3, gain="window_ones")], qkv_bias=False, proj_bias=False)
    state = export_official("FusedKQnA", fresh)
    state["rpe_bias"] = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    found = import_official_layer("FusedKQnA", state, {**layer, "kernel_size": 7}, resize_tables=True)
    again = export_official("FusedKQnA", found)
    torch.testing.assert_close(again["rpe_bias"], by_square(state["rpe_bias"], 7))
    torch.testing.assert_close(again["attn_scale_pos"], torch.ones(1, 1, 49, 2, 2))
