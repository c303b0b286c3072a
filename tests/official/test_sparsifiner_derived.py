"""Sparsifiner's equations once more, in plain torch over the authors' names, for all of which there are no numbers.

The equations themselves are held against the numbers of the authors' code that there are.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import attnkit
from attnkit.testing import random_tensor
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.sparsifiner_arguments import Sparsifiner, SparsifinerLVViT, configuration

EXACT = {"rtol": 1e-5, "atol": 1e-5}
CFG = {
    "BASIS_THRESHOLD": 0.02,
    "BASIS_COEF": {"USE_TOPK": True, "TOPK": 8, "THRESHOLD": 0.05},
    "ATTN_SCORE": {"USE_TOPK": True, "THRESHOLD": 0.0001},
    "PRUNE_ATTN_MATRIX_ROW": False,
    "USE_ATTN_RECON": False,
}
BY_SCORE = {**CFG, "ATTN_SCORE": {"USE_TOPK": False, "THRESHOLD": 0.02}}
BY_SHARE = {**CFG, "BASIS_COEF": {"USE_TOPK": False, "TOPK": 8, "THRESHOLD": 0.05}}


def mask_of(state, q, k, keep, cfg, kept):
    """Which keys each query sees: bool (B, H, N, N); kept is bool (B, N - 1) or None."""
    tokens, heads = q.shape[2], q.shape[1]
    small_q = F.linear(q, state["mask_predictor.proj_c_q.weight"], state["mask_predictor.proj_c_q.bias"])
    small_k = F.linear(k, state["mask_predictor.proj_c_k.weight"], state["mask_predictor.proj_c_k.bias"])
    if kept is not None:
        gone = F.pad(~kept, (1, 0))[:, None, :, None]
        small_q, small_k = small_q.masked_fill(gone, 0.0), small_k.masked_fill(gone, 0.0)
    low = small_q @ (small_k.mT @ state["mask_predictor.proj_n"]) / math.sqrt(heads)
    share = low[:, :, 1:].softmax(-1)
    if cfg["USE_ATTN_RECON"]:
        return torch.ones(len(q), heads, tokens, tokens, dtype=torch.bool)
    coefficients = cfg["BASIS_COEF"]
    if coefficients["USE_TOPK"]:
        least = share.sort(-1, descending=True).values[..., coefficients["TOPK"] - 1 : coefficients["TOPK"]]
        share = share * (share >= least)
    else:
        share = share * (share > coefficients["THRESHOLD"])
    basis = state["mask_predictor.proj_back_n"].abs()
    scores = share @ (basis * (basis > cfg["BASIS_THRESHOLD"])).T
    budget = math.ceil(keep * tokens)
    if kept is not None:
        scores = scores.masked_fill(F.pad(~kept, (1, 0))[:, None, None], -torch.inf)
        budget = min(budget, int(kept[0].sum()))
    if cfg["ATTN_SCORE"]["USE_TOPK"]:
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(budget).indices, True)
    else:
        mask = scores > cfg["ATTN_SCORE"]["THRESHOLD"]
    if kept is not None and cfg["PRUNE_ATTN_MATRIX_ROW"]:
        mask = mask & kept[:, None, :, None]
    return torch.cat([torch.ones_like(mask[:, :, :1]), mask], dim=2)


def attention(state, x, heads, keep, cfg, kept=None, rate=None, scale=None):
    """The layer's output, and the tokens left behind it where `rate` says how many."""
    batch, tokens, dim = x.shape
    columns = F.linear(x, state["qkv.weight"], state.get("qkv.bias"))
    q, k, v = columns.view(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    if kept is not None:
        q, k, v = (one.masked_fill(F.pad(~kept, (1, 0))[:, None, :, None], 0.0) for one in (q, k, v))
    mask = mask_of(state, q, k, keep, cfg, kept)
    logits = q @ k.mT * (scale or (dim // heads) ** -0.5)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), state["proj.weight"], state["proj.bias"])
    if rate is None:
        return out, kept
    scores = weights[:, :, 0, 1:].mean(1)
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    best = scores.topk(math.ceil(rate * (tokens - 1))).indices
    return out, torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def model(state, images, ctor, cfg, *, lv_vit):
    """Logits of the whole network in evaluation, features behind the norm, and the tokens left."""
    x, eps = images, 1e-5 if lv_vit else 1e-6
    for at in (1, 2, 3) if lv_vit else ():
        weight, bn = state[f"patch_embed.conv{at}.weight"], f"patch_embed.bn{at}."
        x = F.conv2d(x, weight, stride=2 if at == 1 else 1, padding=weight.shape[2] // 2)
        numbers = [state[bn + name] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *numbers).relu()
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[2]).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    kept, lam = None, ctor.get("skip_lam", 1.0)
    places = ctor.get("token_pruning_loc_indicator") or [False] * ctor["depth"]
    for at in range(ctor["depth"]):
        place = f"blocks.{at}"
        inner = {key[len(place) + 6 :]: one for key, one in state.items() if key.startswith(f"{place}.attn.")}
        rate = ctor["token_keep_rate_list"][at] if places[at] else None
        keep, scale = ctor["attn_keep_rate_list"][at], ctor.get("qk_scale")
        out, kept = attention(inner, norm(f"{place}.norm1", x), ctor["num_heads"], keep, cfg, kept, rate, scale)
        x = x + out / lam
        hidden = F.linear(norm(f"{place}.norm2", x), *(state[f"{place}.mlp.fc1.{one}"] for one in ("weight", "bias")))
        x = x + F.linear(F.gelu(hidden), *(state[f"{place}.mlp.fc2.{one}"] for one in ("weight", "bias"))) / lam
        if kept is not None:
            x = x.masked_fill(F.pad(~kept, (1, 0))[..., None], 0.0)
    x = norm("norm", x)
    logits = F.linear(x[:, 0], state["head.weight"], state["head.bias"])
    if lv_vit:
        logits = logits + 0.5 * F.linear(x[:, 1:], state["aux_head.weight"], state["aux_head.bias"]).amax(1)
    return logits, x[:, 1:], kept


def random_tree(shapes, tied=False, seed=0):
    """Weights under which attention is far from even, and no two coefficients or scores nearly equal."""
    dice, tree = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            tree[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        numbers = torch.randn(shape, generator=dice, dtype=torch.float64)
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = {"proj_n": 0.7 * shape[0] ** -0.5, "proj_back_n": 0.06}.get(key.rpartition(".")[2], fan**-0.5)
        if key.endswith("running_var"):
            tree[key] = 0.5 + numbers.abs()
        elif len(shape) == 1:
            tree[key] = 0.1 * numbers + (1.0 if key.endswith("weight") else 0.0)
        else:
            tree[key] = numbers * scale * (1.5 if "qkv" in key or "proj_c" in key else 1.0)
    if tied:
        tree |= {key: tree[key.replace("proj_back_n", "proj_n")] for key in tree if key.endswith("proj_back_n")}
    # Numbers that float32 holds, for the choice is made in it.
    return {key: one.float() if one.is_floating_point() else one for key, one in tree.items()}


def agree(out, right, x, atol):
    weights = random_tensor(*right.shape, seed=5, dtype=right.dtype)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=atol)
    found, expected = (torch.autograd.grad((one * weights).sum(), x)[0] for one in (out, right))
    # Rounding goes with the largest gradients.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol * max(1.0, float(expected.abs().max())))


LAYER = {"num_tokens": 65, "dim": 96, "num_heads": 3, "reduce_n_factor": 4, "qkv_bias": True, "attn_keep_rate": 0.25}
PRUNED = {"token_pruning_this_layer": True, "token_keep_rate": 0.5}


def layer_state(ctor):
    shapes = {
        "qkv.weight": (3 * ctor["dim"], ctor["dim"]),
        "proj.weight": (ctor["dim"],) * 2,
        "proj.bias": (ctor["dim"],),
    }
    if ctor.get("qkv_bias"):
        shapes["qkv.bias"] = (3 * ctor["dim"],)
    width, rank = ctor["dim"] // ctor["num_heads"], ctor["num_tokens"] // ctor["reduce_n_factor"]
    small = width // ctor.get("reduce_c_factor", 2)
    for one in ("proj_n", "proj_back_n"):
        shapes[f"mask_predictor.{one}"] = (ctor["num_tokens"], rank)
    for one in ("proj_c_q", "proj_c_k"):
        shapes |= {f"mask_predictor.{one}.weight": (small, width), f"mask_predictor.{one}.bias": (small,)}
    return random_tree(shapes, ctor.get("share_inout_proj", False))


# Fewer tokens than the budget are left of 12, of which the best are not clear where few coefficients count.
@pytest.mark.parametrize(
    ("cfg", "left"),
    [
        *((one, left) for one in (CFG, BY_SCORE) for left in (None, 44, 12)),
        *((one, left) for one in (BY_SHARE, {**BY_SHARE, "BASIS_THRESHOLD": 0.05}) for left in (None, 44)),
        ({**BY_SHARE, "ATTN_SCORE": BY_SCORE["ATTN_SCORE"]}, 12),
    ],
)
@pytest.mark.parametrize(
    "changes", [{}, {"share_inout_proj": True}, {"qkv_bias": False, "reduce_c_factor": 4}], ids=str
)
@pytest.mark.parametrize("row", [False, True], ids="row={}".format)
def test_layers(cfg, changes, left, row):
    ctor, cfg = {**LAYER, **PRUNED, **changes}, {**cfg, "PRUNE_ATTN_MATRIX_ROW": row}
    ctor["token_keep_rate"] = 0.5 if left != 12 else 0.1
    state = layer_state(ctor)
    module = import_official_layer("SparsifinerAttention", state, {"ctor": ctor, "cfg": cfg})
    x = random_tensor(2, 65, 96, seed=3, dtype=torch.float32, grad=True)
    kept, valid = None, torch.ones(2, 65, dtype=torch.bool)
    if left is not None:
        best = random_tensor(2, 64, seed=4).topk(left).indices
        kept = torch.zeros(2, 64, dtype=torch.bool).scatter(1, best, True)
        valid = F.pad(kept, (1, 0), value=True)
    right, after = attention(state, x, 3, 0.25, cfg, kept, ctor["token_keep_rate"])
    out, mask = module.run(x, kept)
    assert torch.equal(module(x, kept), out)
    assert torch.equal(mask, after)
    agree(out[valid], right[valid], x, 2e-5)
    again = export_official("SparsifinerAttention", module)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in again)


def test_the_default_layer():
    """197 tokens, 192 channels, and what else their constructor has as defaults."""
    ctor = {"num_tokens": 197, "dim": 192, "num_heads": 3, "reduce_n_factor": 6, "qkv_bias": True}
    state = layer_state(ctor)
    module = import_official_layer("SparsifinerAttention", state, {"ctor": ctor, "cfg": CFG})
    x = random_tensor(2, 197, 192, seed=3, dtype=torch.float32, grad=True)
    agree(module(x), attention(state, x, 3, 0.25, CFG)[0], x, 2e-5)
    assert module.run(x)[1] is None
    scaled = import_official_layer("SparsifinerAttention", state, {**ctor, "qk_scale": 0.3, "cfg": CFG})
    agree(scaled(x), attention(state, x, 3, 0.25, CFG, scale=0.3)[0], x, 2e-5)


@pytest.mark.parametrize("mask", ["bool", "uint8", "float", "column"])
def test_how_a_mask_may_come(mask):
    state = layer_state(LAYER)
    module = import_official_layer("SparsifinerAttention", state, {"ctor": LAYER})
    x = random_tensor(2, 65, 96, seed=3, dtype=torch.float32)
    kept = random_tensor(2, 64, seed=4) < 0
    given = {"bool": kept, "uint8": kept.byte(), "float": kept.float(), "column": kept[..., None]}[mask]
    assert torch.equal(module(x, given), module(x, kept))


def test_the_layer_of_the_first_stage():
    """Its output is that of dense attention; the guess is the product with all coefficients and signs."""
    state = layer_state(LAYER)
    module = import_official_layer(
        "SparsifinerAttention", state, {"ctor": LAYER, "cfg": {**CFG, "USE_ATTN_RECON": True}}
    )
    x = random_tensor(2, 65, 96, seed=3, dtype=torch.float32, grad=True)
    agree(module(x), attention(state, x, 3, 0.25, {**CFG, "USE_ATTN_RECON": True})[0], x, 2e-5)
    columns = F.linear(x, state["qkv.weight"], state["qkv.bias"])
    q, k, _ = columns.view(2, 65, 3, 3, 32).permute(2, 0, 3, 1, 4)
    small = [
        F.linear(one, state[f"mask_predictor.proj_c_{name}.weight"], state[f"mask_predictor.proj_c_{name}.bias"])
        for name, one in (("q", q), ("k", k))
    ]
    low = small[0] @ (small[1].mT @ state["mask_predictor.proj_n"]) * 3**-0.5
    right = low[:, :, 1:].softmax(-1) @ state["mask_predictor.proj_back_n"].T
    agree(module.mix.run(x, module.grid).aux["0.guess"], right, x, 2e-5)


DEIT = {
    "img_size": 32,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "qkv_bias": True,
    "attn_keep_rate_list": [0.25, 0.25, 0.2, 0.1],
    "reduce_n_factor": 4,
    "reduce_c_factor": 2,
    "token_keep_rate_list": [1.0, 0.7, 0.49, 0.343],
    "token_pruning_loc_indicator": [False, True, True, True],
}
LV_VIT = {name: value for name, value in DEIT.items() if not name.startswith("token")}
LV_VIT |= {"qkv_bias": False, "skip_lam": 2.0, "return_dense": True, "mix_token": True, "p_emb": "4_2"}


@pytest.mark.parametrize(
    ("changes", "cfg"),
    [
        ({}, CFG),
        ({"img_size": (16, 24), "reduce_n_factor": 2}, CFG),
        (
            {"token_pruning_loc_indicator": [True, False, True, False], "token_keep_rate_list": [0.9, 0.1, 0.3, 0.2]},
            CFG,
        ),
        ({"token_pruning_loc_indicator": [False] * 4}, BY_SCORE),
        ({"token_pruning_loc_indicator": None, "share_inout_proj": True}, BY_SHARE),
        ({"qk_scale": 0.3}, {**CFG, "PRUNE_ATTN_MATRIX_ROW": True}),
    ],
    ids=str,
)
def test_models(changes, cfg):
    held("sparsifiner", Sparsifiner, {**DEIT, **changes}, cfg)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 8, "reduce_n_factor": 2}, {"skip_lam": 1.0}], ids=str)
def test_models_of_lv_vit(changes):
    held("sparsifiner_lvvit", SparsifinerLVViT, {**LV_VIT, **changes}, CFG)


def held(family, arguments, ctor, cfg):
    hparams = {"ctor": ctor, "cfg": cfg}
    fresh = attnkit.build(configuration(arguments, hparams))
    shapes = {key: tuple(one.shape) for key, one in export_official(family, fresh).items()}
    state = random_tree(shapes, ctor.get("share_inout_proj", False))
    module = import_official(family, state, hparams)
    height, width = ctor["img_size"] if isinstance(ctor["img_size"], tuple) else (ctor["img_size"],) * 2
    images = random_tensor(2, 3, height, width, seed=1, dtype=torch.float32, grad=True)
    right, features, kept = model(state, images, ctor, cfg, lv_vit=family == "sparsifiner_lvvit")
    agree(module(images), right, images, 5e-5)
    found, left = module.forward_tokens(images)
    torch.testing.assert_close(found[:, 1:], features, rtol=1e-4, atol=5e-5)
    assert (left is None) == (kept is None)
    assert kept is None or torch.equal(left, F.pad(kept, (1, 0), value=True))
    again = export_official(family, module)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in again)


def test_models_of_the_first_stage():
    """Dense in both modes, and nothing is pruned."""
    cfg = {"SPAR": CFG, "LOSS": {"USE_ATTN_RECON": True}}
    fresh = attnkit.build(configuration(Sparsifiner, {**DEIT, "cfg": cfg}))
    state = random_tree({key: tuple(one.shape) for key, one in export_official("sparsifiner", fresh).items()})
    module = import_official("sparsifiner", state, {**DEIT, "cfg": cfg})
    images = random_tensor(2, 3, 32, 32, seed=1, dtype=torch.float32, grad=True)
    plain = {**DEIT, "token_pruning_loc_indicator": None}
    agree(module(images), model(state, images, plain, {**CFG, "USE_ATTN_RECON": True}, lv_vit=False)[0], images, 5e-5)
    assert module.forward_tokens(images)[1] is None


def test_the_equations_are_the_authors(golden):
    """Held against the numbers of their code."""
    for name in ("attn_b_coefthr_shared_n50_d64", "attn_d_tokenmask_rowprune_n65_d96"):
        one = golden(f"sparsifiner/{name}")
        ctor, kept = one.hparams["ctor"], one.tensors.get("token_mask_in")
        kept = None if kept is None else kept.bool()
        rate = ctor["token_keep_rate"] if ctor.get("token_pruning_this_layer") else None
        x = one.tensors["input"]
        keep = ctor["attn_keep_rate"]
        out, after = attention(one.state, x, ctor["num_heads"], keep, one.hparams["cfg"], kept, rate)
        rows = one.tensors["rows_valid"].bool() if kept is not None else None
        one.check(out, "output", rows)
        assert kept is None or torch.equal(after, one.tensors["token_mask_out"].bool())
    one = golden("sparsifiner/full_g_deitlike_attn_only")
    ctor = {**one.hparams["ctor"], "token_pruning_loc_indicator": None}
    logits, features, _ = model(one.state, one.tensors["input"], ctor, one.hparams["cfg"], lv_vit=False)
    one.check(logits, "output")
    one.check(features, "features")
    module = import_official("sparsifiner", one.state, one.hparams)
    with torch.no_grad():
        one.check(module.forward_features(one.tensors["input"])[:, 1:], "features")
