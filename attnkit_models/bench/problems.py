"""Problems: makes a case ready from its sizes, with attnkit and all contenders on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnkit
from attnkit.layouts import Blocks, Layout, Stencil
from attnkit_models.bench.case import DENSE, OURS, Contender, Problem, Setting
from attnkit_models.bench.formulations.biformer_gather import biformer_gather
from attnkit_models.bench.formulations.dense import dense_variants, exact_attention
from attnkit_models.bench.formulations.flexed import flex_neighborhoods, flex_regions
from attnkit_models.bench.formulations.gathered_windows import gathered_windows
from attnkit_models.bench.formulations.haloed import BLOCK, halonet
from attnkit_models.bench.formulations.peers import natten_windows, xformers_windows
from attnkit_models.bench.formulations.shifted_windows import joined, shifted_windows
from attnkit_models.bench.formulations.unfolded import sasa
from attnkit_models.bench.gate import rows_check

MASKED = "SDPA under the mask"
# On a CPU dense attention over more tokens is measured on a share of the queries: it takes time in proportion to them.
WHOLE, SHARE = 20_000, 16

Leaves = tuple[Tensor, Tensor, Tensor]
Visible = Callable[[Tensor], Tensor]


def projected(batch: int, heads: int, tokens: int, width: int, setting: Setting) -> Leaves:
    """q, k and v (B, heads, N, D) as a fused projection leaves them: views of (B, N, 3 * heads * D)."""
    generator = torch.Generator().manual_seed(setting.seed)
    made = torch.randn(setting.batch(batch), tokens, 3, heads, width, generator=generator)
    q, k, v = made.to(setting.device, setting.dtype).permute(2, 0, 3, 1, 4)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def random_numbers(setting: Setting) -> torch.Generator:
    """For what is random beside the inputs."""
    return torch.Generator().manual_seed(setting.seed + 1)


def dense_contender(leaves: Leaves, share: int | None = None) -> Contender:
    """Dense attention over all keys, the best of its variants, on a share of the queries where all would take long."""
    q = leaves[0]
    if share is None:
        share = SHARE if q.device.type == "cpu" and q.shape[2] > WHOLE else 1
    variants = dense_variants(*leaves, rows=q.shape[2] // share)
    first = next(iter(variants.values()))

    def exact(wide: Sequence[Tensor], rows: Tensor) -> Tensor:
        return exact_attention((wide[0], wide[1], wide[2]), rows, None)

    return Contender(first, leaves, rows_check(exact, 64), same=False, times=share, variants=variants)


def _problem(
    leaves: Leaves, layout: Layout, visible: Visible, others: dict[str, Contender], facts: dict[str, float]
) -> Problem:
    """attnkit on a layout, the others, and dense attention, all held to the keys that `visible` tells."""

    def exact(wide: Sequence[Tensor], rows: Tensor) -> Tensor:
        return exact_attention((wide[0], wide[1], wide[2]), rows, visible(rows))

    check = rows_check(exact)
    ours = Contender(lambda: attnkit.attend(*leaves, layout), leaves, check)
    held = {name: replace(one, check=check if one.same else None) for name, one in others.items()}
    density = float(layout.density())
    facts = {"tokens": leaves[0].shape[2], "batch": leaves[0].shape[0], "heads": leaves[0].shape[1], **facts}
    return Problem({OURS: ours, **held, DENSE: dense_contender(leaves)}, density, facts)


def regions(
    setting: Setting, *, batch: int, heads: int, side: int, width: int, regions: int, topk: int, flex: bool = False
) -> Problem:
    """Routed regions on a square map: every region sees `topk` regions drawn at random, row-major in and out."""
    sizes, count = (side, side), regions**2
    leaves = projected(batch, heads, side**2, width, setting)
    items = leaves[0].shape[0]
    drawn = torch.rand(items, count, count, generator=random_numbers(setting)).topk(topk).indices
    index = drawn.to(setting.device)
    layout = Blocks.from_regions(attnkit.Grid(*sizes), regions, index, unique=True)
    place = torch.arange(side, device=setting.device) // (side // regions)
    region = (place[:, None] * regions + place).flatten()

    def visible(rows: Tensor) -> Tensor:
        routed = torch.zeros(items, count, count, dtype=torch.bool, device=rows.device).scatter(2, index, True)
        return routed[:, region[rows]][..., region][:, None]

    others = {
        "BiFormer gather": Contender(lambda: biformer_gather(*leaves, index, sizes, regions), leaves),
    }
    if flex:
        others["FlexAttention"] = flex_regions(leaves, index, sizes, regions)
    return _problem(leaves, layout, visible, others, {"regions": regions, "topk": topk})


def windows(setting: Setting, *, batch: int, heads: int, side: int, width: int, window: int) -> Problem:
    """Windows of `window` tokens drawn at random from a square map."""
    leaves = projected(batch, heads, side**2, width, setting)
    permutation = torch.randperm(side**2, generator=random_numbers(setting)).to(setting.device)
    layout = Blocks.permuted(permutation, window)
    number = permutation.argsort() // window

    def visible(rows: Tensor) -> Tensor:
        return (number[rows][:, None] == number)[None, None]

    others = {
        "gather + SDPA": Contender(lambda: gathered_windows(*leaves, permutation, window), leaves),
        "xformers": xformers_windows(leaves, permutation, window),
    }
    return _problem(leaves, layout, visible, others, {"window": window})


def shifted(setting: Setting, *, batch: int, heads: int, side: int, width: int, window: int, shift: int) -> Problem:
    """Windows of window x window tokens of a square map, moved by `shift` tokens; those at the edges are smaller."""
    sizes = (side, side)
    leaves = projected(batch, heads, side**2, width, setting)
    layout = Blocks.windows(attnkit.Grid(*sizes), window, shift=shift, device=setting.device)
    place = (torch.arange(side, device=setting.device) - shift).div(window, rounding_mode="floor") + 1
    number = (place[:, None] * (side // window + 2) + place).flatten()
    seen = joined(sizes, window, shift, setting.device)

    def visible(rows: Tensor) -> Tensor:
        return (number[rows][:, None] == number)[None, None]

    others = {"gather + SDPA": Contender(lambda: shifted_windows(*leaves, sizes, window, shift, seen), leaves)}
    return _problem(leaves, layout, visible, others, {"window": window})


def stencil(setting: Setting, *, batch: int, heads: int, side: int, width: int, kernel: int) -> Problem:
    """Every token sees the kernel x kernel window around it; nothing lies outside the map."""
    sizes = (side, side)
    leaves = projected(batch, heads, side**2, width, setting)
    layout = Stencil(attnkit.Grid(*sizes), kernel)
    row = torch.arange(side, device=setting.device)
    places = torch.cartesian_prod(row, row)

    def visible(rows: Tensor) -> Tensor:
        return ((places[rows][:, None] - places).abs() <= kernel // 2).all(-1)[None, None]

    others = {
        "SASA unfold": Contender(lambda: sasa(*leaves, sizes, kernel), leaves),
        "NATTEN": natten_windows(leaves, sizes, kernel),
    }
    if side % BLOCK == 0:
        others["HaloNet"] = Contender(lambda: halonet(*leaves, sizes, kernel), leaves)
    return _problem(leaves, layout, visible, others, {"kernel": kernel})


def neighborhood(
    setting: Setting, *, batch: int, heads: int, side: int, width: int, kernel: int, flex: bool = False
) -> Problem:
    """Every token sees kernel x kernel tokens around it; at the border the window is moved inside, as NATTEN's is."""
    sizes = (side, side)
    leaves = projected(batch, heads, side**2, width, setting)
    layout = Stencil(attnkit.Grid(*sizes), kernel, border="clamp")
    row = torch.arange(side, device=setting.device)
    places = torch.cartesian_prod(row, row)
    starts = (places - kernel // 2).clamp(0, side - kernel)

    def visible(rows: Tensor) -> Tensor:
        far = places - starts[rows][:, None]
        return ((far >= 0) & (far < kernel)).all(-1)[None, None]

    mask = visible(torch.arange(side**2, device=setting.device))
    others = {
        MASKED: Contender(lambda: scaled_dot_product_attention(*leaves, attn_mask=mask), leaves),
        "NATTEN": replace(natten_windows(leaves, sizes, kernel), same=True),
    }
    if flex:
        others["FlexAttention"] = flex_neighborhoods(leaves, sizes, kernel)
    return _problem(leaves, layout, visible, others, {"kernel": kernel})
