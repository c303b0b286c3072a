"""Which image comes when: a function of seed and epoch alone, so a resumed run meets the same batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from attnkit.errors import ConfigError
from attnkit_models.train.data import ImageData
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.seeds import seed_of


class EpochOrder(Sampler[int]):
    """Shuffles anew in each epoch; `set_epoch` chooses which.

    Args:
        count: number of images.
        seed: of the run.
        group: images an optimizer step; what does not fill a group waits for another epoch's shuffle.
    """

    def __init__(self, count: int, seed: int, group: int) -> None:
        self.count = count
        self.seed = seed
        self.length = count - count % group if count >= group else count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        yield from torch.randperm(self.count, generator=generator)[: self.length].tolist()


def smallest_batch(images: int, options: TrainOptions, processes: int) -> int:
    """The fewest images that a process trains on at once, >= 1.

    Args:
        images: size of the training set.
        options: how to train.
        processes: how many share a batch.
    """
    length = len(EpochOrder(images, options.seed, options.batch_size * options.grad_accum))
    return max((length % options.batch_size or options.batch_size) // processes, 1)


def _as_it_is(batch: dict) -> dict:
    return batch


def loaders(accelerator: Accelerator, data: ImageData, options: TrainOptions) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders, prepared for this process's share.

    Raises:
        ConfigError: if the batch cannot be divided by the number of processes.
    """
    processes = accelerator.num_processes
    if options.batch_size % processes:
        near = max(options.batch_size // processes, 1) * processes
        raise ConfigError(
            f"batch_size={options.batch_size} cannot be divided among {processes} processes; "
            f"choose a multiple, such as {near}"
        )
    order = EpochOrder(len(data.train), options.seed, options.batch_size * options.grad_accum)
    common = {
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        "collate_fn": _as_it_is,
    }
    train = DataLoader(data.train, sampler=order, **common)
    val = DataLoader(data.val, shuffle=False, **common)
    return accelerator.prepare_data_loader(train), accelerator.prepare_data_loader(val)
