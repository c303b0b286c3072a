"""Devices and dtypes as text: `cuda`, `bfloat16`."""

from __future__ import annotations

from attnkit.errors import ConfigError, did_you_mean

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
# What others call them.
ALIASES = {
    "gpu": "cuda",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float64": "float32",
}


def check_names(device: str | None, dtype: str | None) -> None:
    """Looks at what the user wrote behind `--device` and `--dtype`, None where nothing.

    Raises:
        ConfigError: for another name than those of `DEVICES` and `DTYPES`, naming the nearest.
    """
    for option, one, known in (("--device", device, DEVICES), ("--dtype", dtype, DTYPES)):
        if one is not None and one not in known:
            near = did_you_mean(ALIASES.get(one, one), known)
            raise ConfigError(f"{option} {one!r} is not known{near} (known: {', '.join(known)})")


def check_there(device: str | None, instead: str) -> None:
    """Looks whether PyTorch finds the device.

    Args:
        device: one of `DEVICES`, or None.
        instead: the way out, for the end of the message; may be empty.

    Raises:
        ConfigError: for a GPU that is not there.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda needs a GPU that PyTorch can use; `attnkit doctor` tells what it finds{instead}"
        )
