"""Tuning: times the configurations of Triton's kernels beside their neighbours, and rewrites the table of this GPU."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attnkit.errors import ConfigError
from attnkit.kernels.triton import devices
from attnkit.kernels.triton.blocks import configs
from attnkit.kernels.triton.blocks.configs import Config, Direction
from attnkit_models.bench.scenes import RAGGED, SCENES, SIDES, Run
from attnkit_models.bench.timing import interleaved

NUMBERS = ("bfloat16", "float32", "tf32")
# Below this share of the time before, a neighbour is better; anything above may be chance.
BETTER = 0.97
ROUNDS = 4
SECONDS = 1.0
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 2e-3}


@dataclass(frozen=True)
class Kernel:
    """One line of the table."""

    direction: Direction
    tile: int
    head_dim: int
    numbers: str
    bias: bool

    @property
    def name(self) -> str:
        """`"forward/64/32/bfloat16"`, `"forward/64/32/tf32 and bias"`; what `--only` matches."""
        return f"{self.direction}/{self.tile}/{self.head_dim}/{self.numbers}{' and bias' if self.bias else ''}"

    @property
    def title(self) -> str:
        """The same in words, with the shapes that are timed."""
        result = {"forward": "output", "query_gradient": "gradient of q", "key_gradient": "gradients of k and v"}
        biased = (", under a bias (of the windows in float32)") * self.bias
        return (
            f"{result[self.direction]}, heads of {self.head_dim} in {self.numbers}: routed regions of {self.tokens} "
            f"tokens, windows of {RAGGED[self.tile] ** 2} with a class token{biased}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied as `numbers` says."""
        return torch.bfloat16 if self.numbers == "bfloat16" else torch.float32

    @property
    def tokens(self) -> int:
        """Tokens of a region that is measured for it."""
        return SIDES[self.tile] ** 2

    def configured(self, device_class: str) -> Config:
        """What the table has for it."""
        return configs.configuration(*self._question, device_class, self.bias, self.numbers == "tf32")

    @property
    def spot(self) -> configs.Spot:
        """Where the table has it."""
        return configs.spot_of(*self._question, self.bias, self.numbers == "tf32")

    @property
    def _question(self) -> tuple[Direction, int, int, torch.dtype]:
        return self.direction, self.tokens, self.head_dim, self.dtype


def kernels(only: str | None = None) -> list[Kernel]:
    """All lines of the table, or those whose names match a shell-style pattern.

    Raises:
        ConfigError: if none does.
    """
    every = itertools.product(configs.DIRECTIONS, configs.REGION_SIZES, configs.HEAD_DIMS, NUMBERS, (False, True))
    found = [Kernel(*one) for one in every]
    chosen = [one for one in found if only is None or fnmatch.fnmatchcase(one.name, only)]
    if not chosen:
        raise ConfigError(
            f"no kernel is named {only!r}; names are like {found[0].name!r} and 'key_gradient/*/float32*'"
        )
    return chosen


def neighbours(config: Config, tile: int) -> list[Config]:
    """Configurations that differ in one number: half or twice as many rows, columns or warps, one stage more or less.

    Args:
        config: where to start.
        tile: the most rows a program may have.
    """
    rows, columns, warps, stages = config
    found = [
        *(config._replace(rows=one) for one in (rows // 2, 2 * rows)),
        *(config._replace(columns=one) for one in (columns // 2, 2 * columns)),
        *(config._replace(warps=one) for one in (warps // 2, 2 * warps)),
        *(config._replace(stages=one) for one in (stages - 1, stages + 1)),
    ]
    return [
        one
        for one in found
        if 16 <= one.rows <= tile and 16 <= one.columns <= 128 and 1 <= one.warps <= 8 and 1 <= one.stages <= 4
    ]


def climbed(start: Config, tile: int, times: Callable[[Sequence[Config]], Mapping[Config, float]]) -> Config:
    """The configuration that no neighbour is faster than, found by going to the fastest one.

    Args:
        start: what the table has.
        tile: the most rows a program may have.
        times: measures some configurations side by side, without those that do not run.
    """
    best, tried = start, {start}
    for _ in range(ROUNDS):
        new = [one for one in neighbours(best, tile) if one not in tried]
        tried.update(new)
        found = times([best, *new])
        if best not in found:
            # What the table has does not run here; anything that does is better.
            if not found:
                return start
            best = min(found, key=found.__getitem__)
            continue
        fastest = min(found, key=found.__getitem__)
        if found[fastest] > BETTER * found[best]:
            return best
        best = fastest
    return best


def tune(only: str | None, tell: Callable[[str], object], path: Path = configs.PATH) -> None:
    """Times the configurations of this GPU and writes those that are faster than the table's.

    Args:
        only: pattern of kernels, None for all.
        tell: gets lines for the terminal.
        path: the table to write.

    Raises:
        ConfigError: without a GPU, or for a pattern that matches nothing.
    """
    chosen = kernels(only)
    if not torch.cuda.is_available():
        raise ConfigError("--tune needs a GPU that PyTorch can use, for it times kernels; `attnkit doctor` tells more")
    device = torch.device("cuda", torch.cuda.current_device())
    name = devices.device_class(device)
    for kernel in chosen:
        start = kernel.configured(name)
        with multiplying(kernel):
            runs = [make(kernel, device, images(kernel)) for make in SCENES]
            best = climbed(start, kernel.tile, partial(timed, kernel, device, name, runs, tell))
        if best != start:
            configs.put(name, kernel.spot, best)
        # After each: an interruption loses nothing.
        path.write_text(configs.written(), encoding="utf-8")
        tell(f"{kernel.name:36} {'kept' if best == start else 'now'} {tuple(best)}")
    tell(f"wrote {path}; `make kernels` holds it to registers and shared memory, and renews the page on kernels")


def images(kernel: Kernel) -> int:
    """About as much memory for every width, and so much work that launching takes none of the time."""
    return 64 * 64 // kernel.head_dim * 2 // kernel.dtype.itemsize


@contextmanager
def multiplying(kernel: Kernel) -> Iterator[None]:
    """Multiplies float32 as a line of the table says."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kernel.numbers == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def timed(
    kernel: Kernel,
    device: torch.device,
    device_class: str,
    runs: Sequence[Run],
    tell: Callable[[str], object],
    some: Sequence[Config],
) -> dict[Config, float]:
    """Seconds of every configuration that compiles, fits the GPU and computes what the first of them does in every run:
    the geometric mean of the runs, so that each counts alike."""
    before = configs.own(device_class, kernel.spot)

    def configured(config: Config, run: Run) -> Sequence[Tensor]:
        configs.put(device_class, kernel.spot, config)
        return run()

    sound: list[Config] = []
    expected: list[Sequence[Tensor]] = []
    seconds: dict[Config, float] = {}
    try:
        for config in some:
            try:
                found = [configured(config, run) for run in runs]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:
                # Triton has several classes of errors for what does not fit a GPU, and attnkit_models imports none.
                tell(f"    {tuple(config)} does not run: {str(error).strip().splitlines()[0]}")
                continue
            expected = expected or found
            pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
            if all(alike(one, other) for one, other in pairs):
                sound.append(config)
            else:
                tell(f"    {tuple(config)} is WRONG: it differs from {tuple(some[0])}")
        for run in runs:
            turns = {str(tuple(config)): partial(configured, config, run) for config in sound}
            times = interleaved(turns, SECONDS / len(runs), device)
            for config in sound:
                fastest = min(times[str(tuple(config))].samples)
                seconds[config] = seconds.get(config, 1.0) * fastest ** (1 / len(runs))
    finally:
        configs.put(device_class, kernel.spot, before)
    return seconds


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results agree as far as their precision goes."""
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= TOLERANCE[found.dtype] * expected.float().abs().max())
