"""Counts what the Triton kernels multiply and fetch for small regions in tiles of their own and in shared ones; needs
no GPU.

The routes are those of BiFormer-T at 224 x 224 pixels, with the weights it starts from, on the two photographs that
come with scikit-learn. `python benchmarks/shared_tiles.py` takes some seconds and writes
`benchmarks/results/token-sets/shared.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

import attnkit
from attnkit.kernels import AttendCall, recording
from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.blocks import launches
from attnkit.kernels.triton.blocks.inverse import inverse_of
from attnkit.kernels.triton.packing import shares_tiles
from attnkit.kernels.triton.token_sets import configs
from attnkit.kernels.triton.token_sets.configs import Direction
from attnkit.layouts import Blocks
from attnkit_models.bench.case import Setting
from attnkit_models.bench.machine import machine, now
from attnkit_models.checkpoints.convert import MEAN, STD

RESULTS = Path(__file__).parent / "results" / "token-sets" / "shared.json"
MODEL, SIZE = "biformer_tiny", 224
DEVICE_CLASS, DTYPE = "sm_90", torch.bfloat16
PASSES: tuple[Direction, ...] = configs.DIRECTIONS

Counts = dict[str, float]


def main() -> None:
    """Writes `benchmarks/results/token-sets/shared.json`."""
    calls = small_regions()
    items = [(call, item) for call in calls for item in range(call.q.shape[0])]
    found = []
    for direction in PASSES:
        own, shared = (mean([count(*one, direction) for one in items]) for count in (own_tiles, shared_tiles))
        found.append({"pass": direction, "own": own, "shared": shared})
        print(found[-1])
    head = {"kind": "shared tiles", "machine": machine(Setting()), **now(), "model": MODEL, "size": SIZE}
    layout = calls[0].layout
    assert isinstance(layout, Blocks) and layout.index is not None
    about = {
        "layers": len(calls),
        "images": calls[0].q.shape[0],
        "tokens": layout.num_keys,
        "tokens of a region": layout.order.token.shape[3],
        "topk": layout.index.shape[3],
    }
    rows = ",\n".join(f"    {json.dumps(one)}" for one in found)
    text = json.dumps({**head, **about}, indent=2)[:-2]
    RESULTS.write_text(f'{text},\n  "cases": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def small_regions() -> list[AttendCall]:
    """The calls in which regions share tiles."""
    torch.manual_seed(0)
    model = attnkit.build(MODEL).eval()
    photographs = torch.stack([torch.from_numpy(one.copy()) for one in load_sample_images().images])
    images = F.interpolate(photographs.permute(0, 3, 1, 2).float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad(), recording() as choices:
        model(normalised)
    return [one.call for one in choices if shares_tiles(one.call)]


def own_tiles(call: AttendCall, item: int, direction: Direction) -> Counts:
    """What one head of an image takes where every region has tiles of its own."""
    layout = call.layout
    assert isinstance(layout, Blocks) and layout.index is not None
    constants = constants_of(call, layout, direction)
    index, tokens = layout.index[item, 0], layout.order.token.shape[3]
    if direction != "key_gradient":
        rows, columns, listed = constants["BLOCK_M"], constants["BLOCK_N"], layout.key_slots
        programs = layout.num_blocks * -(-tokens // rows)
        return counted([listed] * programs, rows, columns)
    rows, columns = constants["BLOCK_N"], constants["BLOCK_M"]
    share = inverse_of(layout.index, layout.num_blocks, -(-columns // tokens)).share
    listed = []
    for count in index.flatten().bincount(minlength=layout.num_blocks).tolist():
        pieces = max(count // share, 1)
        size = -(-count // pieces)
        listed += [(min(size, count - first * size)) * tokens for first in range(pieces)]
    return counted(listed, rows, columns)


def shared_tiles(call: AttendCall, item: int, direction: Direction) -> Counts:
    """What it takes where they share tiles."""
    layout = call.layout
    assert isinstance(layout, Blocks)
    mask = layout.image_mask()[item, 0]
    if direction == "key_gradient":
        # As `attnkit.kernels.triton.token_sets.listing` ranks them.
        mask = mask.mT[mask.sum(0).argsort(descending=True, stable=True)]
    else:
        mask = mask[layout.order.slot[0, 0].argsort()]
    rows, columns, *_ = configs.configuration(direction, call.q.shape[3], DTYPE, DEVICE_CLASS)
    mask = F.pad(mask, (0, 0, 0, -len(mask) % rows))
    return counted(mask.unflatten(0, (-1, rows)).any(1).sum(-1).tolist(), rows, columns)


def constants_of(call: AttendCall, layout: Blocks, direction: Direction) -> dict[str, Any]:
    """The constants of the kernel of blocks."""
    routes = layout.index
    assert routes is not None
    q, k, v = (torch.empty(one.shape, dtype=DTYPE, device="meta") for one in (call.q, call.k, call.v))
    token, slot, index = (one.to("meta") for one in (layout.order.token, layout.order.slot, routes))
    cut = layout.order.padded
    tables = BlockTables(token, slot, token, slot, index, None, None, layout.prefix, [cut, cut], call.scale)
    first = launches.forward_of(q, k, v, tables, DEVICE_CLASS)
    given = (torch.empty_like(first.out), None, first.out, first.total, first.peak, q, k, v)
    back = launches.backward_of(*given, tables, [True, True, True, False], DEVICE_CLASS)
    for launch in (first.launch, *back.launches):
        if launch.kernel.__name__ == f"blocks_{direction}":
            return dict(launch.constants)
    raise AssertionError(f"no kernel of blocks makes the {direction} of this call")


def counted(listed: list[int], rows: int, columns: int) -> Counts:
    """Programs, pairs that they multiply and rows that they fetch, one program for each list."""
    return {
        "programs": len(listed),
        "pairs": sum(rows * columns * -(-one // columns) for one in listed),
        "rows": sum(listed),
    }


def mean(counts: list[Counts]) -> Counts:
    """The average of each count."""
    return {name: round(sum(one[name] for one in counts) / len(counts), 1) for name in counts[0]}


if __name__ == "__main__":
    main()
