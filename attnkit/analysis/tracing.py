"""Tracing: one pass through a module that leaves no mark on it, with every attention call and its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attnkit.arguments import is_count
from attnkit.blocks import Block
from attnkit.errors import AttnkitError, ConfigError, ShapeError, shown
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.kernels import Choice, recording
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.dispatch import wrapping
from attnkit.primitives import HeadGroup, HeadInputs, HeadOutput

# Eight gigabytes in float32.
MOST_NUMBERS = 2**31

ImageSize: TypeAlias = "int | tuple[int, int] | Grid"


@dataclass(eq=False)
class Visit:
    """One run of a head group, or of another module that calls `attend` itself.

    Attributes:
        path: name of the module inside the one that was run.
        module: the module.
        choices: what dispatch decided for each call of `attend`, in order; none for a convolution.
        inputs: what went into a head group.
        output: what came out of a head group.
    """

    path: str
    module: nn.Module
    choices: list[Choice] = field(default_factory=list)
    inputs: HeadInputs | None = None
    output: HeadOutput | None = None

    @property
    def kind(self) -> str:
        """Name of the primitive, or of the module's class."""
        options = getattr(self.module, "options", None)
        return getattr(options, "kind", "") or type(self.module).__name__

    @property
    def heads(self) -> int:
        """Number of heads: the group's own, or those of its calls."""
        options = getattr(self.module, "options", None)
        return getattr(options, "heads", 0) or sum(choice.call.q.shape[1] for choice in self.choices)


@contextmanager
def hooked(
    module: nn.Module,
    enter: Callable[[str, nn.Module, tuple[Any, ...]], None],
    leave: Callable[[str, nn.Module, Any], None],
) -> Iterator[None]:
    """Calls `enter(path, submodule, arguments)` before a submodule runs, `leave(path, submodule, output)` after it."""

    def before(name: str) -> Callable[..., None]:
        return lambda one, given: enter(name, one, given)

    def after(name: str) -> Callable[..., None]:
        return lambda one, given, output: leave(name, one, output)

    with ExitStack() as stack:
        for name, one in module.named_modules():
            stack.callback(one.register_forward_pre_hook(before(name)).remove)
            stack.callback(one.register_forward_hook(after(name), always_call=True).remove)
        yield


def visits(module: nn.Module, inputs: tuple[Any, ...]) -> list[Visit]:
    """Runs a module and returns its head groups and attention calls in the order in which they came."""
    found: list[Visit] = []
    running: list[Visit] = []

    def enter(path: str, one: nn.Module, given: tuple[Any, ...]) -> None:
        running.append(Visit(path, one))
        if isinstance(one, HeadGroup) and given and isinstance(given[0], HeadInputs):
            running[-1].inputs = given[0]
            found.append(running[-1])

    def leave(path: str, one: nn.Module, output: Any) -> None:
        visit = running.pop()
        if visit.inputs is not None:
            visit.output = output

    def watch(call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
        group = next((visit for visit in reversed(running) if visit.inputs is not None), None)
        visit = group or (running[-1] if running else Visit("", module))
        if visit not in found:
            found.append(visit)
        visit.choices.append(choices[-1])
        return compute()

    with hooked(module, enter, leave), recording() as choices, wrapping(watch):
        module(*inputs)
    return found


@contextmanager
def unmarked(module: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Runs a block of code with a module in one mode, and undoes whatever running it changed.

    Modes, buffers and plain numbers of all submodules and the global random state are put back. Compiled modules run
    uncompiled. Gradients are recorded in training only.
    """
    states = [(one, _plain(one), dict(one._buffers), _copies(one)) for one in module.modules()]
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    generators = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(generators),
            torch.compiler.set_stance("force_eager"),
            torch.set_grad_enabled(training),
        ):
            module.train(training)
            yield
    finally:
        for one, plain, buffers, copies in states:
            one.__dict__.update(plain)
            one._buffers.update(buffers)
            with torch.no_grad():
                for name, old in copies.items():
                    # Writing only what changed leaves a backward pass that is still to come alone.
                    if not old.is_meta and not torch.equal(buffers[name], old):  # type: ignore[arg-type]
                        buffers[name].copy_(old)  # type: ignore[union-attr]


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module._buffers.items() if one is not None}


def prepared(
    module: Any, what: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The module itself, or a copy on another device or in another dtype.

    Raises:
        ConfigError: if `module` is none, or cannot be moved.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{what} needs a module, such as attnkit.build('bigbird_vit_micro') or a HeadMix, but got {shown(module)}"
        )
    module = getattr(module, "_orig_mod", module)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"{what} needs a floating dtype, such as torch.bfloat16, but got dtype={shown(dtype)}")
    if device is None and dtype is None:
        return module
    if _is_cuda(device) and not torch.cuda.is_available():
        raise _cannot(what, device, "PyTorch finds no GPU that it can use (`attnkit doctor` tells more)")
    try:
        return copy.deepcopy(module).to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise _cannot(what, device, str(error).splitlines()[0]) from error


def _is_cuda(device: Any) -> bool:
    try:
        return torch.device(device).type == "cuda"
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return False


def _cannot(what: str, device: Any, reason: str) -> ConfigError:
    to = f"{what} cannot bring the model to device={shown(device)}"
    return ConfigError(f"{to}: {reason}; without device= it stays where it is")


@contextmanager
def reported(what: str, module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Says in one sentence that a module failed, and on what, unless it has said so itself."""
    try:
        yield
    except (AttnkitError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        given = ", ".join(shown(one) for one in inputs)
        raise ShapeError(f"{what} ran {type(module).__name__} on {given}, and it failed: {reason}") from error


def example_inputs(module: nn.Module, size: ImageSize, batch: int = 1) -> tuple[Any, ...]:
    """Arguments for one run: images for a model; tokens or a map for a `HeadMix`, a `Block` or a stack of them.

    The values are normally distributed, always the same, and drawn without touching the global random state.

    Args:
        module: what will be run.
        size: pixels of the image, or tokens of the layer's grid; a `Grid` may bring prefix tokens for a layer.
        batch: number of images.
    """
    width = layer_width(module)
    prefix = size.prefix if isinstance(size, Grid) else 0
    sizes = sizes_of(size)
    if width is None and (prefix or len(sizes) != 2):
        raise ShapeError(f"a model takes an image size such as 224 or (height, width), but got {shown(size)}")
    shape = (*sizes, width) if width is not None else (image_channels(module), *sizes)
    if batch * math.prod(shape) > MOST_NUMBERS:
        raise ShapeError(f"{shown(size)} makes an input of {' x '.join(map(str, shape))} numbers, which is too large")
    like = next((one for one in module.parameters() if one.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    if prefix and width is not None:
        grid = Grid(*sizes, prefix=prefix)
        return torch.randn(batch, grid.tokens, width, generator=generator).to(like), grid
    if width is not None and len(sizes) == 1:
        return torch.randn(batch, sizes[0], width, generator=generator).to(like), Grid(*sizes)
    return (torch.randn(batch, *shape, generator=generator).to(like),)


def sizes_of(size: Any) -> tuple[int, ...]:
    """Height and width from a number, a pair or a grid.

    Raises:
        ShapeError: for anything else.
    """
    if isinstance(size, Grid):
        return size.sizes
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if not sizes or not all(is_count(one, 1) for one in sizes):
        raise ShapeError(f"image_size is an integer >= 1, or (height, width), but got {shown(size)}")
    return sizes


def described(module: nn.Module, size: ImageSize) -> str:
    """What `example_inputs` makes, for titles: "HeadMix on 14 x 14 tokens"."""
    behind = f" behind {size.prefix} prefix" if isinstance(size, Grid) and size.prefix else ""
    return f"{type(module).__name__} on {' x '.join(map(str, sizes_of(size)))} {unit_of(module)}{behind}"


def unit_of(module: nn.Module) -> str:
    """What image sizes count: a model's pixels, a layer's tokens."""
    return "pixels" if layer_width(module) is None else "tokens"


def layer_width(module: nn.Module) -> int | None:
    """Channels of the maps a layer takes; None for a model, which takes images."""
    if isinstance(module, HeadMix):
        return module.dim
    if isinstance(module, Block):
        return module.mix.dim
    if isinstance(module, nn.Sequential) and len(module):
        return layer_width(module[0])
    return None


def image_channels(module: nn.Module) -> int:
    """Channels of the images a model takes: what it says, else what its first convolution takes."""
    for holder in (module, getattr(module, "config", None)):
        channels = getattr(holder, "in_chans", None)
        if isinstance(channels, int):
            return channels
    for one in module.modules():
        if isinstance(one, nn.Conv2d):
            return one.in_channels
    return 3
