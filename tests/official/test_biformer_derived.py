"""BiFormer's equations once more, in plain torch over the authors' state dict, for all of which there are no numbers.

The equations themselves are held against the numbers of the authors' code that there are.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import attnkit
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.biformer import BIFORMER
from attnkit_models.checkpoints.family import family_named, layer_named
from attnkit_models.checkpoints.keys import outward

EXACT = {"rtol": 1e-8, "atol": 1e-9}


class Below:
    """The part of a state dict below a name."""

    def __init__(self, state, prefix=""):
        self.state, self.prefix = state, prefix

    def __truediv__(self, name):
        return Below(self.state, f"{self.prefix}{name}.")

    def __contains__(self, name):
        return any(key == self.prefix + name or key.startswith(f"{self.prefix}{name}.") for key in self.state)

    def __getitem__(self, name):
        return self.state.get(self.prefix + name)

    def linear(self, x):
        """Over the last axis; a convolution of one pixel is a linear layer."""
        return F.linear(x, self["weight"].flatten(1), self["bias"])

    def depthwise(self, x, padding):
        """Over a map (B, H, W, C)."""
        weight = self["weight"]
        return F.conv2d(x.movedim(-1, 1), weight, self["bias"], padding=padding, groups=len(weight)).movedim(1, -1)

    def layer_norm(self, x):
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"], 1e-6)

    def norm(self, x):
        """Of a map (B, C, H, W): by batch statistics where there are any, else over channels."""
        if "running_mean" in self:
            return F.batch_norm(x, self["running_mean"], self["running_var"], self["weight"], self["bias"])
        return self.layer_norm(x.movedim(1, -1)).movedim(-1, 1)

    def conv(self, x, stride, padding):
        return F.conv2d(x, self["weight"], self["bias"], stride, padding)


def lepe(state, x, args, default):
    side = args.get("side_dwconv", default)
    return (state / "lepe").depthwise(x, side // 2) if side > 0 else 0.0


def attended(q, k, v, heads, scale):
    """(..., Nq, C) over (..., Nk, C), heads side by side in the channels."""
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(-2, -3) for one in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def routed(state, x, args):
    """BiLevelRoutingAttention: x (B, H, W, C) -> (B, H, W, C)."""
    side, heads, topk = args.get("n_win", 7), args.get("num_heads", 8), args.get("topk", 4)
    height, width = x.shape[1:3]
    if args.get("auto_pad"):
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    h, w = x.shape[1] // side, x.shape[2] // side
    assert x.shape[1:3] == (h * side, w * side)
    narrow = args.get("qk_dim") or args["dim"]
    scale = args.get("qk_scale") or narrow**-0.5
    q, k, v = (state / "qkv" / "qkv").linear(x).split([narrow, narrow, args["dim"]], dim=-1)
    local = lepe(state, v, args, 3)

    def regions(one):
        return [one[:, i * h : (i + 1) * h, j * w : (j + 1) * w] for i in range(side) for j in range(side)]

    q_regions, k_regions, v_regions = regions(q), regions(k), regions(v)
    queries, keys = (torch.stack([one.mean((1, 2)) for one in part], 1) for part in (q_regions, k_regions))
    if not args.get("diff_routing"):
        queries, keys = queries.detach(), keys.detach()
    if args.get("param_routing"):
        queries, keys = ((state / "router" / "emb").linear(one) for one in (queries, keys))
    best = ((queries * scale) @ keys.mT).topk(topk, dim=-1)
    weights = best.values.softmax(-1) if args.get("soft_routing") else torch.ones_like(best.values)

    def pooled(one):
        mode = args.get("kv_downsample_mode", "identity")
        image, ratio = one.movedim(-1, 1), args.get("kv_downsample_ratio", 4)
        if mode.startswith("ada_"):
            pool = F.adaptive_avg_pool2d if mode == "ada_avgpool" else F.adaptive_max_pool2d
            image = pool(image, args.get("kv_per_win", 4))
        elif mode != "identity" and ratio > 1:
            image = {"avgpool": F.avg_pool2d, "maxpool": F.max_pool2d}[mode](image, ratio)
        return image.flatten(2).mT

    k_pooled, v_pooled = (torch.stack([pooled(one) for one in part], 1) for part in (k_regions, v_regions))
    out = torch.zeros_like(v)
    for region in range(side * side):
        i, j = divmod(region, side)
        items = []
        for item in range(len(x)):
            chosen, factor = best.indices[item, region], weights[item, region][:, None, None]
            near = [(one[item, chosen] * factor).flatten(0, 1) for one in (k_pooled, v_pooled)]
            items.append(attended(q_regions[region][item].flatten(0, 1), *near, heads, scale))
        out[:, i * h : (i + 1) * h, j * w : (j + 1) * w] = torch.stack(items).unflatten(1, (h, w))
    out = out + local
    out = (state / "wo").linear(out) if args.get("param_attention", "qkvo") == "qkvo" else out
    return out[:, :height, :width]


def routed_nchw(state, x, args):
    """The function of nchwBRA, on maps (B, H, W, C)."""
    count, heads, topk = args.get("n_win", 7), args.get("num_heads", 8), args.get("topk", 4)
    height, width = x.shape[1:3]
    h, w = height // count, width // count
    rows, columns = math.ceil(height / h), math.ceil(width / w)
    q, k, v = (state / "qkv_linear").linear(x).chunk(3, dim=-1)
    local = lepe(state, v, args, 3)
    scale = args.get("qk_scale") or args["dim"] ** -0.5

    def means(one):
        image = one.detach().movedim(-1, 1)
        return F.avg_pool2d(image, (h, w), ceil_mode=True, count_include_pad=False).flatten(2).mT

    def parts(one):
        filled = F.pad(one, (0, 0, 0, columns * w - width, 0, rows * h - height))
        return filled.unflatten(2, (columns, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    chosen = (means(q) @ means(k).mT).topk(topk, dim=-1).indices
    near = [torch.stack([one[at][chosen[at]] for at in range(len(x))]).flatten(2, 3) for one in (parts(k), parts(v))]
    out = attended(parts(q), *near, heads, scale)
    out = out.unflatten(2, (h, w)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return (state / "output_linear").linear(out[:, :height, :width] + local)


def dense(state, x, args, source=None):
    """Attention, AttentionLePE (source "x") and the function of nchwAttentionLePE (source "v")."""
    heads = args.get("num_heads", 8)
    q, k, v = (state / "qkv").linear(x).chunk(3, dim=-1)
    scale = args.get("qk_scale") or (args["dim"] // heads) ** -0.5
    out = attended(*(one.flatten(1, 2) for one in (q, k, v)), heads, scale).unflatten(1, x.shape[1:3])
    if source is not None:
        out = out + lepe(state, x if source == "x" else v, args, 5)
    return (state / "proj").linear(out)


def attention(state, x, args):
    """What a block's topk stands for."""
    topk = args.get("topk", 4)
    if topk > 0:
        return routed(state, x, {"kv_downsample_mode": "ada_avgpool", "side_dwconv": 5, **args})
    if topk == 0:
        return (state / "3").linear((state / "2").depthwise((state / "1").linear(x), 2))
    small = {"dim": args["dim"], "side_dwconv": args.get("side_dwconv", 5)}
    return dense(state, x, small, "x" if topk == -2 else None)


def block(state, x, args):
    """Block: x (B, C, H, W) -> (B, C, H, W)."""
    x = x.movedim(1, -1)
    if args.get("before_attn_dwconv", 3) > 0:
        x = x + (state / "pos_embed").depthwise(x, 1)

    def mlp(x):
        x = (state / "mlp" / "0").linear(x)
        x = (state / "mlp" / "1" / "dwconv").depthwise(x, 1) if args.get("mlp_dwconv") else x
        return (state / "mlp" / "3").linear(F.gelu(x))

    branches = [
        (lambda x: attention(state / "attn", x, args), state / "norm1", state["gamma1"]),
        (mlp, state / "norm2", state["gamma2"]),
    ]
    for branch, norm, scale in branches:
        gamma = 1.0 if scale is None else scale
        if args.get("pre_norm", True):
            x = x + gamma * branch(norm.layer_norm(x))
        else:
            x = norm.layer_norm(x + gamma * branch(x))
    return x.movedim(-1, 1)


def biformer(state, x, args):
    """BiFormer's logits."""
    down = state / "downsample_layers"
    widths = args["embed_dim"]
    narrow = [one or width for one, width in zip(args.get("qk_dims", widths), widths, strict=True)]
    for stage in range(4):
        if stage:
            x = (down / stage / 1).norm((down / stage / 0).conv(x, 2, 1))
        else:
            x = F.gelu((down / 0 / 1).norm((down / 0 / 0).conv(x, 2, 1)))
            x = (down / 0 / 4).norm((down / 0 / 3).conv(x, 2, 1))
        own = {
            "dim": widths[stage],
            "qk_dim": narrow[stage],
            "num_heads": narrow[stage] // args["head_dim"],
            "topk": args["topks"][stage],
            "mlp_ratio": args["mlp_ratios"][stage],
            "kv_per_win": args["kv_per_wins"][stage],
            "kv_downsample_ratio": args.get("kv_downsample_ratios", [4, 2, 1, 1])[stage],
        }
        for at in range(args["depth"][stage]):
            x = block(state / "stages" / stage / at, x, {**args, **own})
    return (state / "head").linear((state / "norm").norm(x).mean((2, 3)))


def swin_layout(state, x, args, nchw):
    """The logits of BiFormerSTL, or nchwBiFormerSTL."""
    down = state / "downsample_layers"
    for stage in range(4):
        if stage:
            x = (down / stage / 1).conv((down / stage / 0).norm(x), 2, 0)
        else:
            x = (down / 0 / 1).norm((down / 0 / 0).conv(x, 4, 0))
        width, topk = args["embed_dim"][stage], args["topks"][stage]
        own = {"dim": width, "num_heads": width // args["head_dim"], "n_win": args["n_wins"][stage], "topk": topk}
        own["side_dwconv"] = args.get("side_dwconv", 5)
        for at in range(args["depth"][stage]):
            inner = state / "stages" / stage / "blocks" / at
            tokens = x.movedim(1, -1)
            normed = (inner / "norm1").layer_norm(tokens)
            if nchw:
                layer = inner / "attn"
                mixed = routed_nchw(layer, normed, own) if topk > 0 else dense(layer, normed, {"dim": width}, "v")
            else:
                mixed = attention(inner / "attn", normed, {**own, "kv_downsample_mode": "identity"})
            tokens = tokens + mixed
            hidden = F.gelu((inner / "mlp" / "0").linear((inner / "norm2").layer_norm(tokens)))
            x = (tokens + (inner / "mlp" / "2").linear(hidden)).movedim(-1, 1)
    return (state / "head").linear((state / "norm").norm(x).mean((2, 3)))


def channels_first(layer):
    return lambda state, x, args: layer(state, x.movedim(1, -1), args).movedim(-1, 1)


EQUATIONS = {
    "BiLevelRoutingAttention": routed,
    "nchwBRA": channels_first(routed_nchw),
    "Attention": dense,
    "AttentionLePE": lambda state, x, args: dense(state, x, args, "x"),
    "nchwAttentionLePE": channels_first(lambda state, x, args: dense(state, x, args, "v")),
    "Block": block,
    "biformer": biformer,
    "biformer_stl": lambda state, x, args: swin_layout(state, x, args, False),
    "biformer_stl_nchw": lambda state, x, args: swin_layout(state, x, args, True),
}

BRA = {"dim": 32, "num_heads": 4, "n_win": 4, "topk": 3, "side_dwconv": 5}
BLOCK = {"dim": 16, "num_heads": 2, "n_win": 3, "topk": 4}
LAYERS = {
    "rectangle_narrow": ("BiLevelRoutingAttention", {**BRA, "qk_dim": 48}, (2, 8, 12, 32)),
    "narrow": ("BiLevelRoutingAttention", {**BRA, "qk_dim": 16}, (1, 8, 8, 32)),
    "defaults": ("BiLevelRoutingAttention", {"dim": 16}, (2, 14, 7, 16)),
    "padded": ("BiLevelRoutingAttention", {**BRA, "n_win": 7, "topk": 16, "auto_pad": True}, (2, 17, 12, 32)),
    "empty_regions": ("BiLevelRoutingAttention", {**BRA, "n_win": 7, "topk": 4, "auto_pad": True}, (2, 9, 8, 32)),
    "fewer_tokens_than_regions": ("BiLevelRoutingAttention", {**BRA, "n_win": 7, "auto_pad": True}, (1, 5, 5, 32)),
    "soft": ("BiLevelRoutingAttention", {**BRA, "soft_routing": True}, (2, 8, 8, 32)),
    "soft_padded": ("BiLevelRoutingAttention", {**BRA, "soft_routing": True, "auto_pad": True}, (2, 7, 6, 32)),
    "soft_diff": (
        "BiLevelRoutingAttention",
        {**BRA, "soft_routing": True, "diff_routing": True, "qk_scale": 0.3},
        (2, 8, 8, 32),
    ),
    "soft_diff_param": (
        "BiLevelRoutingAttention",
        {**BRA, "soft_routing": True, "diff_routing": True, "param_routing": True, "qk_dim": 24},
        (2, 8, 12, 32),
    ),
    "soft_pooled": (
        "BiLevelRoutingAttention",
        {**BRA, "soft_routing": True, "kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
        (2, 12, 16, 32),
    ),
    "adaptive_mean": ("BiLevelRoutingAttention", {**BRA, "kv_downsample_mode": "ada_avgpool"}, (2, 16, 16, 32)),
    "adaptive_mean_uneven": (
        "BiLevelRoutingAttention",
        {**BRA, "kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
        (2, 12, 20, 32),
    ),
    "adaptive_mean_of_few": ("BiLevelRoutingAttention", {**BRA, "kv_downsample_mode": "ada_avgpool"}, (1, 12, 8, 32)),
    "adaptive_max": (
        "BiLevelRoutingAttention",
        {**BRA, "kv_downsample_mode": "ada_maxpool", "kv_per_win": 2},
        (2, 12, 20, 32),
    ),
    "mean": ("BiLevelRoutingAttention", {**BRA, "kv_downsample_mode": "avgpool"}, (1, 16, 20, 32)),
    "mean_padded": (
        "BiLevelRoutingAttention",
        {**BRA, "kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2, "auto_pad": True},
        (1, 15, 9, 32),
    ),
    "max": (
        "BiLevelRoutingAttention",
        {**BRA, "kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2},
        (2, 8, 12, 32),
    ),
    "ratio_of_one": (
        "BiLevelRoutingAttention",
        {**BRA, "kv_downsample_mode": "maxpool", "kv_downsample_ratio": 1},
        (1, 8, 8, 32),
    ),
    "no_projection": ("BiLevelRoutingAttention", {**BRA, "param_attention": "qkv", "side_dwconv": 0}, (2, 8, 8, 32)),
    "all_regions": ("BiLevelRoutingAttention", {**BRA, "n_win": 7, "topk": 49}, (2, 7, 14, 32)),
    "nchw_rectangle": ("nchwBRA", {**BRA, "qk_scale": 0.4}, (2, 32, 8, 12)),
    "nchw_padded": ("nchwBRA", {**BRA, "topk": 5}, (2, 32, 17, 12)),
    "nchw_many_regions": ("nchwBRA", {**BRA, "n_win": 7, "side_dwconv": 0, "auto_pad": True}, (1, 32, 13, 13)),
    "nchw_defaults": ("nchwBRA", {"dim": 16}, (1, 16, 14, 9)),
    "dense": ("Attention", {"dim": 64}, (2, 5, 7, 64)),
    "dense_scaled": ("Attention", {"dim": 12, "num_heads": 3, "qkv_bias": True, "qk_scale": 0.3}, (1, 4, 6, 12)),
    "dense_lepe": ("AttentionLePE", {"dim": 16, "num_heads": 2, "side_dwconv": 3, "qkv_bias": True}, (2, 5, 7, 16)),
    "dense_no_lepe": ("AttentionLePE", {"dim": 16, "side_dwconv": -1}, (2, 5, 7, 16)),
    "nchw_dense_lepe": ("nchwAttentionLePE", {"dim": 64}, (2, 64, 5, 7)),
    "block": ("Block", BLOCK, (2, 16, 6, 12)),
    "block_post_norm": (
        "Block",
        {
            **BLOCK,
            "pre_norm": False,
            "layer_scale_init_value": 0.1,
            "mlp_dwconv": True,
            "mlp_ratio": 2.5,
            "auto_pad": True,
            "kv_downsample_mode": "identity",
            "drop_path": 0.2,
        },
        (2, 16, 7, 5),
    ),
    "block_convolutions": ("Block", {"dim": 12, "topk": 0, "mlp_ratio": 3}, (2, 12, 6, 5)),
    "block_dense": ("Block", {"dim": 16, "topk": -1, "before_attn_dwconv": -1, "kv_per_win": -1}, (2, 16, 6, 5)),
    "block_dense_lepe": (
        "Block",
        {"dim": 16, "topk": -2, "side_dwconv": 3, "layer_scale_init_value": 1},
        (2, 16, 6, 5),
    ),
}

SMALL = {
    "depth": [1, 1, 2, 1],
    "embed_dim": [8, 16, 32, 64],
    "mlp_ratios": [3, 3, 3, 3],
    "kv_downsample_mode": "identity",
    "kv_per_wins": [-1, -1, -1, -1],
    "qk_dims": [8, 16, 32, 64],
    "head_dim": 8,
    "num_classes": 10,
    "n_win": 4,
    "topks": [1, 4, 16, -2],
}
SWIN = {
    "norm_layer": "BatchNorm2d",
    "depth": [1, 1, 2, 1],
    "embed_dim": [8, 16, 32, 64],
    "mlp_ratios": [4, 4, 4, 4],
    "head_dim": 8,
    "num_classes": 10,
    "n_wins": [4, 4, 4, 4],
    "topks": [1, 4, 8, -2],
}
MODELS = {
    "rectangle": ("biformer", SMALL, (1, 3, 64, 128)),
    "padded": (
        "biformer",
        {**SMALL, "auto_pad": True, "layer_scale_init_value": 0.5, "mlp_dwconv": True, "mlp_ratios": [3, 2, 1, 2.5]},
        (1, 3, 75, 100),
    ),
    "post_norm_soft": (
        "biformer",
        {**SMALL, "pre_norm": False, "soft_routing": True, "diff_routing": True, "param_routing": True},
        (2, 3, 64, 64),
    ),
    "pooled": (
        "biformer",
        {
            **SMALL,
            "topks": [8, 8, -1, 0],
            "kv_downsample_mode": "ada_avgpool",
            "kv_per_wins": [2, 2, -1, -1],
            "qk_dims": [16, None, 32, 64],
            "in_chans": 1,
            "before_attn_dwconv": 0,
        },
        (1, 1, 64, 128),
    ),
    "stl": ("biformer_stl", SWIN, (1, 3, 64, 64)),
    "stl_layer_norm": ("biformer_stl", {**SWIN, "norm_layer": "LayerNorm2d", "topks": [2, 3, -1, 0]}, (1, 3, 66, 131)),
    "stl_nchw": ("biformer_stl_nchw", {**SWIN, "topks": [1, 4, 8, -1]}, (1, 3, 64, 64)),
    "stl_nchw_padded": (
        "biformer_stl_nchw",
        {
            **SWIN,
            "topks": [1, 4, 8, -1],
            "n_wins": [5, 3, 3, 2],
            "side_dwconv": 3,
            "pre_head_norm_layer": "LayerNorm2d",
        },
        (2, 3, 107, 75),
    ),
}


def rounded(name, table, released_state):
    """Our module in float64 with random weights, and those weights under the authors' names."""
    upstream, args, shape = table[name]
    build = import_official if table is MODELS else import_official_layer
    shapes = {key: tuple(one.shape) for key, one in fresh(upstream, args).items()}
    state = released_state(shapes)
    return build(upstream, state, args).double(), {key: one.double() for key, one in state.items()}, args, shape


def fresh(upstream, args):
    """A state dict with the authors' names from options alone."""
    if upstream in EQUATIONS and upstream.startswith("biformer"):
        return export_official(upstream, attnkit.build(family_named(upstream).config(args)))
    return export_official(upstream, layer_named(upstream).build(args, {}))


def compare(module, table, state, args, equations, shape):
    """Outputs, gradients of the input and of every parameter."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = dict(module.named_parameters())
    pairs = [pair for pair in table.pairs(module.state_dict()) if pair.ours in own]
    theirs = {**state, **{pair.theirs: state[pair.theirs].requires_grad_() for pair in pairs}}
    out = module(x)
    right = equations(Below(theirs), x, args)
    torch.testing.assert_close(out, right, **EXACT)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(out, [x, *own.values()], cotangent)
    expected = torch.autograd.grad(right, [x, *(theirs[pair.theirs] for pair in pairs)], cotangent)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    gradients = outward(pairs, dict(zip(own, found[1:], strict=True)))
    for pair, gradient in zip(pairs, expected[1:], strict=True):
        torch.testing.assert_close(
            gradients[pair.theirs], gradient, **EXACT, msg=lambda text, pair=pair: f"{pair.theirs}: {text}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_blocks(name, released_state):
    module, state, args, shape = rounded(name, LAYERS, released_state)
    upstream = LAYERS[name][0]
    again = export_official(upstream, module)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in again)
    compare(module, layer_named(upstream).table(module), state, args, EQUATIONS[upstream], shape)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, released_state):
    model, state, args, shape = rounded(name, MODELS, released_state)
    upstream = MODELS[name][0]
    again = export_official(upstream, model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key].double(), state[key]) for key in again)
    compare(model, family_named(upstream).table(model.config), state, args, EQUATIONS[upstream], shape)


@pytest.mark.parametrize(
    "name",
    [
        "bra_std",
        "bra_pad",
        "nchw_bra_std",
        "nchw_bra_pad",
        "attention_lepe",
        "block_std",
        "micro_biformer_112",
        "micro_stl",
        "micro_stl_nchw",
    ],
)
def test_the_equations_give_the_authors_numbers(name, golden):
    one = golden(f"biformer/{name}")
    x = one.tensors["input"].requires_grad_()
    out = EQUATIONS[one.facts["family"] or one.facts["upstream_class"]](Below(one.state), x, one.hparams)
    one.check(out, "output")
    one.check(torch.autograd.grad(out, x, one.tensors["cotangent"])[0], "grad_input")


def test_names_of_everything_that_can_be_switched_on():
    """The state dict's names as the authors' code makes them."""
    args = {"dim": 16, "num_heads": 2, "qk_dim": 8, "soft_routing": True, "diff_routing": True, "param_routing": True}
    names = fresh("Block", {**args, "layer_scale_init_value": 1.0, "mlp_dwconv": True})
    assert {key: tuple(one.shape) for key, one in names.items()} == {
        "pos_embed.weight": (16, 1, 3, 3),
        "pos_embed.bias": (16,),
        "norm1.weight": (16,),
        "norm1.bias": (16,),
        "attn.qkv.qkv.weight": (32, 16),
        "attn.qkv.qkv.bias": (32,),
        "attn.router.emb.weight": (8, 8),
        "attn.router.emb.bias": (8,),
        "attn.wo.weight": (16, 16),
        "attn.wo.bias": (16,),
        "attn.lepe.weight": (16, 1, 5, 5),
        "attn.lepe.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "mlp.0.weight": (64, 16),
        "mlp.0.bias": (64,),
        "mlp.1.dwconv.weight": (64, 1, 3, 3),
        "mlp.1.dwconv.bias": (64,),
        "mlp.3.weight": (16, 64),
        "mlp.3.bias": (16,),
        "gamma1": (16,),
        "gamma2": (16,),
    }
    convolutions = fresh("Block", {"dim": 6, "topk": 0})
    assert {key: tuple(one.shape) for key, one in convolutions.items() if key.startswith("attn.")} == {
        "attn.1.weight": (6, 6, 1, 1),
        "attn.1.bias": (6,),
        "attn.2.weight": (6, 1, 5, 5),
        "attn.2.bias": (6,),
        "attn.3.weight": (6, 6, 1, 1),
        "attn.3.bias": (6,),
    }


def test_the_public_models_are_what_their_arguments_make(released_state):
    """The recipe and the arguments of the authors' own factory functions are one function, where maps divide."""
    args = {
        "depth": [2, 2, 8, 2],
        "embed_dim": [64, 128, 256, 512],
        "mlp_ratios": [3, 3, 3, 3],
        "qk_dims": [64, 128, 256, 512],
        "head_dim": 32,
        "kv_downsample_mode": "identity",
        "kv_per_wins": [-1, -1, -1, -1],
        "topks": [1, 4, 16, -2],
        "drop_path_rate": 0.1,
    }
    state = released_state({key: tuple(one.shape) for key, one in fresh("biformer", args).items()})
    assert BIFORMER.config(args).drop_path == 0.1
    x = torch.randn(1, 3, 224, 112)
    with torch.no_grad():
        assert torch.equal(import_official("biformer", state, args)(x), import_official("biformer_tiny", state)(x))
