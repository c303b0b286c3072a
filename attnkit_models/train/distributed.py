"""The accelerator, and jobs that one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
)

from attnkit.errors import AttnkitError, ConfigError
from attnkit_models.train.options import TrainOptions

Result = TypeVar("Result")

# Sharded weights would need sharded checkpoints.
_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
)


def make_accelerator(options: TrainOptions) -> Accelerator:
    """The accelerator for this process, alone or one of several that a launcher started.

    Raises:
        ConfigError: if the device cannot compute in the wanted precision, or the launcher set up something
            else than data parallelism.
    """
    wanted = None if options.mixed_precision == "auto" else options.mixed_precision
    try:
        accelerator = Accelerator(
            # Without this, processes of torchrun on a machine without a GPU would not find each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=wanted,
            # As a plugin, because a plain number is overruled by what `accelerate launch` has as its default.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=options.grad_accum),
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        )
    except ValueError as error:
        raise ConfigError(f"mixed_precision={options.mixed_precision!r} cannot be used here: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision='fp16' needs a GPU; on this CPU use 'bf16' or 'no'")
    if accelerator.distributed_type not in _SUPPORTED:
        raise ConfigError(
            f"attnkit train runs on one device or data parallel, but the launcher set up "
            f"{accelerator.distributed_type}; choose multi-GPU or multi-CPU in `accelerate config`"
        )
    return accelerator


def on_main(accelerator: Accelerator, job: Callable[[], Result]) -> Result:
    """Lets the main process do a job and gives every process its result, or its error.

    Without this, a full disk would end one process and leave the others waiting for it.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = job()
        except AttnkitError as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
