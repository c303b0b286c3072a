"""QnA's equations once more, in plain torch over the authors' parameter tree, for all of which there are no numbers.

The equations themselves are held against the numbers of the authors' code that there are.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import attnkit
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.qna_arguments import qna_config

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def windows(x, kernel, stride, padding):
    """(B, H, W, ...) -> (B, places, kernel * kernel, ...), zeros around the map."""
    tail = x.shape[3:]
    flat = x.flatten(3).permute(0, 3, 1, 2)
    found = F.unfold(flat, kernel, padding=padding, stride=stride)
    return found.unflatten(1, (flat.shape[1], -1)).permute(0, 3, 2, 1).unflatten(3, tail)


def fused_qna(state, x, args):
    """FusedKQnA: x (B, H, W, C) -> (B, H', W', F)."""
    heads, kernel, stride, queries = args["heads"], args["kernel_size"], args["stride"], args["n_queries"]
    padding, width = args["padding"], args["features"] // heads
    rows = queries * heads
    query = state["query"].view(queries, heads, width)
    if args.get("normalize_q", True):
        length = query.square().sum(-1, keepdim=True).sqrt()
        query = query / ((length.detach() if args.get("qna_normalize_stop_grads") else length) + 1e-6)
    query = query / math.sqrt(width)
    key = (x @ state["Wk"]).unflatten(-1, (heads, width)) + state.get("Wk_b", 0.0)
    raised = torch.einsum("bijmd,qmd->bijqm", key, query).flatten(3).exp()
    value = (x @ state["to_v.kernel"] + state.get("to_v.bias", 0.0)).unflatten(-1, (heads, width))
    table = torch.ones(kernel**2, rows, dtype=x.dtype)
    if args.get("pos_embedding_type", "relative_pos") == "relative_pos":
        table = (state["rpe_bias"] / (math.sqrt(width) if args.get("scale_rpe_bias") else 1.0)).exp()
    half = rows // 2
    scale = {
        "normal": lambda: state["attn_scale_weights"][0, 0],
        "normal_elementwise": lambda: state["attn_scale_weights"][0, 0],
        "ones": lambda: state["attn_scale_pos"][0, 0].flatten(1),
        "posneg": lambda: torch.cat([torch.ones(half), -torch.ones(half)]).to(x.dtype)[None],
        "avg": lambda: torch.full((1, rows), 1 / queries, dtype=x.dtype),
        "none": lambda: torch.ones(1, rows, dtype=x.dtype),
    }[args.get("attn_scale", "normal")]()
    near = windows(raised, kernel, stride, padding) * table
    below = near.sum(2)
    values = windows(value, kernel, stride, padding)
    above = torch.einsum("bntqm,bntmd->bnqmd", (near * scale).unflatten(3, (queries, heads)), values)
    out = (above / below.unflatten(2, (queries, heads))[..., None]).sum(2).flatten(2)
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[1:3]]
    return (out @ state["to_out.kernel"] + state.get("to_out.bias", 0.0)).unflatten(1, sizes)


def self_attention(state, x, heads, window):
    """MultiHeadSelfAttention: x (windows * B, tokens, C)."""
    q, k, v = (x @ state["to_qkv.kernel"]).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    logits = torch.einsum("nimd,njmd->nmij", q, k) / math.sqrt(q.shape[-1])
    table = state.get("RelativePositionalEmbedding_0.rpe_bias")
    if table is not None:
        for i in range(window**2):
            for j in range(window**2):
                down, right = i // window - j // window + window - 1, i % window - j % window + window - 1
                logits[:, :, i, j] += table[down * (2 * window - 1) + right]
    out = torch.einsum("nmij,njmd->nimd", logits.softmax(-1), v).flatten(2)
    return out @ state["to_out.kernel"]


def below(state, prefix):
    return {key[len(prefix) :]: one for key, one in state.items() if key.startswith(prefix)}


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.scale"], state[f"{name}.bias"], 1e-6)


def block(state, x, mix):
    """A pre-norm block; x (B, H, W, C) or (N, tokens, C)."""
    shortcut = x
    if "Conv_0.kernel" in state:
        shortcut = x[:, ::2, ::2] @ state["Conv_0.kernel"][0, 0]
    mixed = mix(norm(state, "LayerNorm_0", x))
    x = shortcut + mixed * state.get("LayerScale_0.scale_param", 1.0)
    hidden = norm(state, "LayerNorm_1", x) @ state["MlpBlock_0.Dense_0.kernel"] + state["MlpBlock_0.Dense_0.bias"]
    out = F.gelu(hidden, approximate="tanh") @ state["MlpBlock_0.Dense_1.kernel"] + state["MlpBlock_0.Dense_1.bias"]
    return x + out * state.get("LayerScale_1.scale_param", 1.0)


def cut(x, window):
    """(B, H, W, C) -> (B * windows, window * window, C)."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def pasted(x, window, shape):
    """The inverse of `cut`."""
    batch, height, width, channels = shape
    x = x.view(batch, height // window, width // window, window, window, channels)
    return x.transpose(2, 3).reshape(shape)


def model(state, images, config):
    """The whole network: images (B, H, W, 3) -> logits."""
    stem = state["StemBlock_0.conv_1x1.kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(images.permute(0, 3, 1, 2), stem, stride=4).permute(0, 2, 3, 1)
    for stage in range(config["n_stages"]):
        dim, window, shape = x.shape[-1], config["lsa_window"][stage], x.shape
        if config["lsa_layers"][stage]:
            x = cut(x, window)
            for at in range(config["lsa_layers"][stage]):
                inner = below(state, f"LSAStage_{stage}.MSA_Block_{at + 1}.")
                attention, heads = below(inner, "MultiHeadSelfAttention_0."), config["lsa_heads"][stage]
                x = block(inner, x, lambda x, a=attention, h=heads, w=window: self_attention(a, x, h, w))
            x = pasted(x, window, shape)
        count, last = config["qna_layers"][stage], stage == config["n_stages"] - 1
        for at in range(count + (not last)):
            down = at == count
            inner = below(state, f"QnAStage_{stage}.QnA_Block_{at + 1}{'_stride_2' if down else ''}.")
            kernel = config["qna_receptive_field"][stage]
            args = {
                "features": dim * (1 + down),
                "heads": config["qna_heads"][stage] * (1 + down),
                "kernel_size": kernel,
                "stride": 1 + down,
                "padding": kernel // 2,
                "n_queries": config["qna_num_queries"],
                "attn_scale": config["qna_attention_scale"],
                "normalize_q": config["qna_normalize_q"][stage],
            }
            query = below(inner, "FusedKQnA_0.")
            x = block(inner, x, lambda x, q=query, a=args: fused_qna(q, x, a))
    x = norm(state, "ClassificationHead_0.LayerNorm_0", x).mean((1, 2))
    head = below(state, "ClassificationHead_0.head_logits.")
    return x @ head["kernel"] + head["bias"]


def random_tree(shapes, seed=0):
    """Weights under which attention is far from even."""
    dice = torch.Generator().manual_seed(seed)
    tree = {}
    for key, shape in shapes.items():
        fan = math.prod(shape[:-1]) if key.endswith("kernel") else 1
        fan = shape[0] / 4 if key.endswith("Wk") else fan
        offset = 1.0 if key.endswith("scale") else 0.0
        # Numbers that float32 holds, in float64.
        tree[key] = (offset + torch.randn(shape, generator=dice) / math.sqrt(fan)).double()
    return tree


def qna_shapes(channels, args):
    """Names and shapes of a FusedKQnA's parameters."""
    features, queries, heads, places = args["features"], args["n_queries"], args["heads"], args["kernel_size"] ** 2
    out = args.get("out_features") or features
    shapes = {
        "query": (queries, features),
        "Wk": (channels, features),
        "to_v.kernel": (channels, features),
        "to_out.kernel": (features, out),
    }
    if args.get("pos_embedding_type") != "none":
        shapes["rpe_bias"] = (places, queries * heads)
    scales = {
        "normal": ("attn_scale_weights", (1, 1, places, queries * heads)),
        "normal_elementwise": ("attn_scale_weights", (1, 1, 1, queries * heads)),
        "ones": ("attn_scale_pos", (1, 1, places, queries, heads)),
    }
    if args.get("attn_scale", "normal") in scales:
        name, shape = scales[args.get("attn_scale", "normal")]
        shapes[name] = shape
    if args.get("use_bias"):
        shapes |= {"Wk_b": (heads, features // heads), "to_v.bias": (features,), "to_out.bias": (out,)}
    return shapes


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def agree(run, expected, x, tree, upstream, module=None):
    """Output, input gradient and weights back under the authors' names."""
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out = run(x)
    torch.testing.assert_close(out, expected, **EXACT)
    gradients = [torch.autograd.grad(one, x, cotangent)[0] for one in (out, expected)]
    torch.testing.assert_close(*gradients, **EXACT)
    again = export_official(upstream, module or run)
    assert set(again) == set(tree)
    assert all(torch.equal(again[key], tree[key]) for key in again)


@pytest.mark.parametrize("name", ["qna_k3_s1", "qna_k7_s2", "qna_k5_bias_scaledrpe"])
def test_the_equations_give_the_authors_numbers(name, golden):
    one = golden(f"qna/{name}")
    out = fused_qna(one.state, one.tensors["input"], one.hparams)
    one.check(out, "output")


def test_the_equations_of_a_model_give_the_authors_numbers(golden):
    one = golden("qna/qna_vit_micro")
    one.check(model(one.state, one.tensors["input"], one.hparams["config"]), "output")


BASE = {"features": 12, "heads": 3, "kernel_size": 3, "stride": 1, "padding": 1, "n_queries": 2}


@pytest.mark.parametrize("sizes", [(6, 6), (9, 7), (1, 2)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": 7, "padding": 3},
        {"stride": 2},
        {"kernel_size": 7, "padding": 3, "stride": 2},
        {"kernel_size": 1, "padding": 0, "stride": 3},
        {"n_queries": 1},
        {"n_queries": 4},
        {"normalize_q": False},
        {"qna_normalize_stop_grads": True},
        {"kernel_size": 5, "padding": 2, "use_bias": True, "scale_rpe_bias": True, "out_features": 10},
        {"attn_scale": "ones"},
        {"attn_scale": "avg", "n_queries": 4},
        {"attn_scale": "none"},
        {"attn_scale": "normal_elementwise"},
        {"attn_scale": "posneg"},
        {"pos_embedding_type": "none"},
        {"features": 24, "stride": 2, "heads": 6},
    ],
    ids=str,
)
def test_every_option_of_the_layer(changes, sizes):
    args = {**BASE, **changes}
    tree = random_tree(qna_shapes(12, args))
    module = import_official_layer("FusedKQnA", tree, args).double()
    x = inputs(2, *sizes, 12)
    agree(module, fused_qna(tree, x, args), x, tree, "FusedKQnA")


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("attn_scale", ["normal", "normal_elementwise", "ones", "avg", "none"])
@pytest.mark.parametrize("named", [{}, {"scale": None}, {"factor": None, "n_queries": 1}])
def test_upsampling(scale, attn_scale, named):
    """out[s i + a, s j + b] is the layer of the single query a s + b, with the keys, values and output of all."""
    args = {**BASE, "attn_scale": attn_scale, "kernel_size": 5, "padding": 2, "scale_rpe_bias": True, "use_bias": True}
    count, heads = scale**2, args["heads"]
    tree = random_tree(qna_shapes(12, {**args, "n_queries": count}))
    named = {name: scale if value is None else value for name, value in named.items()}
    given = {name: value for name, value in args.items() if name != "n_queries"}
    module = import_official_layer("QnAUpsample", tree, {**given, "n_queries": count, **named}).double()
    x = inputs(2, 4, 5, 12)
    expected = torch.zeros(2, 4 * scale, 5 * scale, 12, dtype=x.dtype)
    for at in range(count):
        rows = slice(at * heads, (at + 1) * heads)
        single = {**tree, "query": tree["query"][at : at + 1], "rpe_bias": tree["rpe_bias"][:, rows]}
        if "attn_scale_weights" in tree:
            single["attn_scale_weights"] = tree["attn_scale_weights"][..., rows]
        if "attn_scale_pos" in tree:
            single["attn_scale_pos"] = tree["attn_scale_pos"][:, :, :, at : at + 1]
        out = fused_qna(single, x, {**args, "n_queries": 1})
        expected[:, at // scale :: scale, at % scale :: scale] = out
    agree(module, expected, x, tree, "QnAUpsample")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_blocks(stride, layer_scale):
    args = {**BASE, "stride": stride, "features": 12 * stride}
    width = args["features"]
    shapes = {f"FusedKQnA_0.{name}": shape for name, shape in qna_shapes(12, args).items()}
    for at, channels in enumerate((12, width)):
        shapes |= {f"LayerNorm_{at}.scale": (channels,), f"LayerNorm_{at}.bias": (channels,)}
    shapes |= {
        "MlpBlock_0.Dense_0.kernel": (width, 4 * width),
        "MlpBlock_0.Dense_0.bias": (4 * width,),
        "MlpBlock_0.Dense_1.kernel": (4 * width, width),
        "MlpBlock_0.Dense_1.bias": (width,),
    }
    if stride == 2:
        shapes["Conv_0.kernel"] = (1, 1, 12, 24)
    if layer_scale:
        shapes |= {f"LayerScale_{at}.scale_param": (width,) for at in range(2)}
    tree = random_tree(shapes)
    block_of = {**args, "layer_scale": layer_scale, "mlp_ratio": 4, "train": False}
    module = import_official_layer("QnABlock", tree, block_of).double()
    x = inputs(2, 5, 6, 12)
    query = below(tree, "FusedKQnA_0.")
    agree(module, block(tree, x, lambda x: fused_qna(query, x, args)), x, tree, "QnABlock")


@pytest.mark.parametrize("biased", [True, False])
def test_attention_inside_windows(biased):
    shapes = {"to_qkv.kernel": (10, 36), "to_out.kernel": (12, 7)}
    if biased:
        shapes["RelativePositionalEmbedding_0.rpe_bias"] = (25, 4)
    tree = random_tree(shapes)
    args = {"features": 12, "heads": 4, "window_size": 3, "use_relative_pe": biased, "output_features": 7}
    module = import_official_layer("MultiHeadSelfAttention", tree, args).double()
    x = inputs(3, 9, 10)
    agree(module, self_attention(tree, x, 4, 3), x, tree, "MultiHeadSelfAttention")


def test_attention_inside_windows_that_are_not_square_or_have_biases():
    """Windows of one row: the offsets are those along it."""
    shapes = {"to_qkv.kernel": (8, 24), "to_qkv.bias": (24,), "to_out.kernel": (8, 8), "to_out.bias": (8,)}
    tree = random_tree({**shapes, "RelativePositionalEmbedding_0.rpe_bias": (7, 2)})
    args = {"features": 8, "heads": 2, "window_size": [1, 4], "use_bias": True, "attention_dropout": 0.0}
    module = import_official_layer("MultiHeadSelfAttention", tree, args).double()
    x = inputs(2, 4, 8)
    q, k, v = (x @ tree["to_qkv.kernel"] + tree["to_qkv.bias"]).unflatten(-1, (2, -1)).chunk(3, dim=-1)
    logits = torch.einsum("nimd,njmd->nmij", q, k) / 2
    offsets = torch.arange(4)[:, None] - torch.arange(4) + 3
    logits = logits + tree["RelativePositionalEmbedding_0.rpe_bias"][offsets].permute(2, 0, 1)
    out = torch.einsum("nmij,njmd->nimd", logits.softmax(-1), v).flatten(2)
    agree(module, out @ tree["to_out.kernel"] + tree["to_out.bias"], x, tree, "MultiHeadSelfAttention")


MICRO = {
    "n_stages": 4,
    "base_dim": 8,
    "qna_heads": [2, 4, 8, 16],
    "qna_receptive_field": [3, 3, 3, 3],
    "qna_layers": [1, 2, 1, 0],
    "qna_attention_scale": "normal",
    "qna_num_queries": 2,
    "qna_normalize_q": [True, True, True, True],
    "lsa_layers": [0, 0, 2, 1],
    "lsa_window": [4, 4, 4, 2],
    "lsa_heads": [1, 2, 4, 8],
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qna_receptive_field": [7, 7, 7, 7]},
        {"qna_receptive_field": [7, 5, 3, 1], "layer_scale": 0.5},
        {"lsa_layers": [1, 0, 1, 1], "qna_layers": [1, 1, 1, 2], "lsa_window": [4, 4, 2, 1]},
        {"qna_attention_scale": "posneg", "qna_normalize_q": [True, False, True, False], "qna_num_queries": 4},
        {"qna_attention_scale": "ones", "lsa_pos_embedding_type": "none"},
        {"n_stages": 2},
    ],
    ids=str,
)
def test_models(changes):
    config = {**MICRO, **changes}
    hparams = {"num_classes": 10, "img_size": 64, "config": config}
    fresh = attnkit.build(qna_config(hparams))
    tree = random_tree({key: tuple(one.shape) for key, one in export_official("qna_vit", fresh).items()})
    module = import_official("qna_vit", tree, hparams).double()
    x = inputs(1, 64, 64, 3)
    agree(lambda x: module(x.permute(0, 3, 1, 2)), model(tree, x, config), x, tree, "qna_vit", module)
