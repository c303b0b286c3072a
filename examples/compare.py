"""Compares every primitive on growing maps: multiply-adds of a layer, and the time it takes here.

python examples/compare.py            # 14 x 14, 28 x 28 and 56 x 56 tokens
python examples/compare.py 8 16       # other sides
"""

from __future__ import annotations

import sys
import time

import torch

import attnkit
from attnkit import HeadMix

WIDTH = 64
PRIMITIVES = [
    attnkit.Dense(heads=2),
    attnkit.Window(heads=2, window=7),
    attnkit.CrossShaped(heads=2, stripe=2),
    attnkit.Neighborhood(heads=2, kernel=7),
    attnkit.Linformer(heads=2, tokens=196, rank=49),
    attnkit.TopKRegion(heads=2, regions=7, topk=4),
    attnkit.SoftTopKRegion(heads=2, regions=7, topk=4),
    attnkit.PaddedTopKRegion(heads=2, regions=7, topk=4),
    attnkit.MaskPredictor(heads=2, tokens=196, keep=0.25),
    attnkit.ThresholdMaskPredictor(heads=2, tokens=196, score=0.01),
    attnkit.CompetingMaskPredictor(heads=2, tokens=196, keep=0.25),
    attnkit.MaskReconstruction(heads=2, tokens=196),
    attnkit.LearnedQuery(heads=2, kernel=3),
    attnkit.LearnedUpsample(heads=2, kernel=3),
    attnkit.RandomWindow(heads=2, window=49),
    attnkit.PooledGlobal(heads=2, pool=4),
    attnkit.Conv(heads=2),
]


def milliseconds(mix: HeadMix, x: torch.Tensor, repeats: int = 5) -> float:
    """The fastest of a few forward passes."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            mix(x)
            times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


def main(sides: list[int]) -> None:
    """Prints the comparison, one row per primitive."""
    print(f"{'':25}" + "".join(f"{f'{side} x {side}':>26}" for side in sides))
    for options in PRIMITIVES:
        mix = HeadMix(WIDTH, [options]).eval()
        cells = []
        for side in sides:
            count = attnkit.flops(mix, side).total
            spent = milliseconds(mix, torch.randn(1, side, side, WIDTH))
            cells.append(f"{count / 1e6:11.1f} M {spent:9.2f} ms")
        print(f"{options.kind:25}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main([int(side) for side in sys.argv[1:]] or [14, 28, 56])
