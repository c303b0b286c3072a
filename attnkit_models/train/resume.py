"""Everything a killed run needs to go on as if nothing had happened, in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.errors import CheckpointError, shown
from attnkit_models.train.checkpoint import check_weights, load_weights, pack, read_header
from attnkit_models.train.options import FREE_ON_RESUME

WEIGHTS = "model/"
OPTIMIZER = "optimizer/"
# What the optimizer remembers of every parameter that ever got a gradient.
ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far training is: finished epochs and what was measured in each.

    Args:
        epoch: finished epochs.
        history: one record an epoch, the lines of `metrics.jsonl`.
        identity: model, data and options of the run; a continuation must have the same.
        scaler: state of the fp16 loss scaler, where there is one.
    """

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the first epoch that reached the highest validation accuracy."""
        return max(self.history, key=lambda record: (record["val_accuracy"], -record["epoch"]), default=None)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under parameter names: `exp_avg/blocks.0.norm.weight`."""
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{named[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> bytes:
    """The resume file's content. Weights hold buffers too, such as the draw counters of random windows."""
    tensors = {WEIGHTS + name: value for name, value in model.state_dict().items()}
    tensors |= {OPTIMIZER + name: value for name, value in optimizer_tensors(model, optimizer).items()}
    return pack(tensors, {"kind": "resume", **vars(progress)})


def read_progress(path: Path) -> Progress:
    """How far the run of a resume file came.

    Raises:
        CheckpointError: if the file is no resume file.
    """
    header = read_header(path)
    if header.pop("kind", None) != "resume":
        raise CheckpointError(f"{path} holds weights only and cannot continue a run; --resume needs resume.safetensors")
    right = {"epoch": int, "history": list, "identity": dict, "scaler": dict}
    wrong = [name for name, kind in right.items() if type(header.get(name)) is not kind]
    if wrong or len(header) > len(right) or not all(map(_is_record, header["history"])):
        raise CheckpointError(
            f"{path} does not say how far its run came ({', '.join(wrong) or 'history'} cannot be used); start anew "
            "with --overwrite"
        )
    if header["epoch"] != len(header["history"]):
        raise CheckpointError(
            f"{path} is of epoch {header['epoch']} but tells of {len(header['history'])}; start anew with --overwrite"
        )
    return Progress(**header)


def _is_record(found: Any) -> bool:
    """Whether this is the record of an epoch, with what the choice of the best one needs."""
    if not isinstance(found, dict):
        return False
    return type(found.get("epoch")) is int and type(found.get("val_accuracy")) in (int, float)


def unpack_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts a resume file's tensors back into the model and its optimizer, all of them or none.

    Raises:
        CheckpointError: if they are not those of this model and of an optimizer of its parameters.
    """
    parameters = dict(model.named_parameters())
    weights = {name.removeprefix(WEIGHTS): one for name, one in tensors.items() if name.startswith(WEIGHTS)}
    others = {name: one for name, one in tensors.items() if not name.startswith(WEIGHTS)}
    check_weights(model, weights, source=str(path))
    state = _optimizer_state(path, parameters, others)
    load_weights(model, weights, source=str(path))
    for owner, found in state.items():
        parameter = parameters[owner]
        for key, tensor in found.items():
            # Adam counts its steps on the CPU; what has the parameter's shape gets its memory layout too.
            place = torch.empty_like(tensor) if key == "step" else torch.empty_like(parameter, dtype=tensor.dtype)
            optimizer.state[parameter][key] = place.copy_(tensor)


def _optimizer_state(
    path: Path, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter, checked against the parameters themselves."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, owner = name.removeprefix(OPTIMIZER).partition("/")
        known = name.startswith(OPTIMIZER) and key in ADAM and owner in parameters
        shape = parameters[owner].shape if known and key != "step" else ()
        if not known or tensor.shape != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path} holds {name!r} {tensor.dtype} {tuple(tensor.shape)}, which is no part of this model's "
                "training state; start anew with --overwrite"
            )
        state.setdefault(owner, {})[key] = tensor
    for owner, found in state.items():
        if len(found) < len(ADAM):
            missing = ", ".join(key for key in ADAM if key not in found)
            raise CheckpointError(f"{path} lacks {missing} of {owner}; start anew with --overwrite")
    return state


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], place: Path) -> None:
    """Makes sure that a run is continued with what it was started with.

    Raises:
        CheckpointError: naming the first differences.
    """
    # Through JSON, because one side comes from a file, where tuples are lists.
    ours = _flat(json.loads(json.dumps(wanted)))
    theirs = _flat(json.loads(json.dumps(found)))
    free = {f"options.{name}" for name in FREE_ON_RESUME}
    different = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name) and name not in free]
    if different:
        listed = [f"{name} was {shown(theirs.get(name))} and is now {shown(ours.get(name))}" for name in different[:3]]
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise CheckpointError(
            f"{place} holds another run: {', '.join(listed)}{more}; continue it with what it was started with, "
            "or start anew with --overwrite or another --out"
        )


def _flat(plain: Any, path: str = "") -> dict[str, Any]:
    if isinstance(plain, dict):
        items = [(f"{path}.{key}" if path else str(key), value) for key, value in plain.items()]
    elif isinstance(plain, list) and any(isinstance(one, (dict, list)) for one in plain):
        items = [(f"{path}[{index}]", value) for index, value in enumerate(plain)]
    else:
        return {path: plain}
    return {name: value for path, inner in items for name, value in _flat(inner, path).items()}
