"""The xformers backend: its memory-efficient attention, with windows as runs of one row under a block-diagonal mask."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import load_extra
from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, fetched, pairs
from attnkit.kernels.softmax import global_rows
from attnkit.kernels.transforms import differentiating
from attnkit.layouts import Blocks, Dense
from attnkit.layouts.cache import cached

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Its kernels load vectors of 16 bytes.
ALIGNED = 8
NEWEST = (9, 0)


class XFormersBackend(MeasuredBackend):
    """Windows are copied behind each other; xformers keeps the softmax of each inside its run of rows."""

    name: ClassVar[str] = "xformers"
    on_demand: ClassVar[str] = "it was not measured on a GPU yet"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        if type(call.layout) not in (Blocks, Dense):
            # Nothing that could be installed or moved would change that.
            return (f"a {call.layout.kind} layout is no block-diagonal mask; it takes windows and dense",)
        reasons = []
        device = call.q.device
        uneven = [one for one in (call.q.shape[3], call.v.shape[3]) if one % ALIGNED]
        if device.type != "cuda":
            reasons.append(f"xformers has attention for cuda only, and q lies on {device}; move q, k and v to a GPU")
        elif torch.cuda.is_available() and torch.cuda.get_device_capability(device) > NEWEST:
            reasons.append("xformers has no kernels for GPUs newer than compute capability 9.0")
        if not _installed():
            reasons.append("xformers is not installed; run: pip install 'attnkit[xformers]'")
        reasons += _layout_reasons(call)
        if call.q.dtype not in DTYPES:
            reasons.append(f"xformers takes float32, float16 and bfloat16, not {call.q.dtype}")
        if call.q.dtype != call.v.dtype:
            reasons.append(f"q and k are {call.q.dtype} but v is {call.v.dtype}; it needs one dtype")
        if uneven:
            reasons.append(f"its kernels need head widths that are multiples of {ALIGNED}, not {uneven[0]}")
        if call.bias is not None:
            reasons.append("a block-diagonal mask of xformers leaves no room for a bias")
        if call.gain is not None:
            reasons.append("a gain multiplies the weights after the softmax, which the fused kernel does not do")
        if call.return_lse:
            reasons.append("return_lse=True, and xformers' lse has no gradient")
        if not call.q.numel() or not call.k.numel():
            reasons.append("xformers does not take empty tensors")
        if torch.compiler.is_compiling():
            reasons.append("xformers chooses its kernel in Python that torch.compile cannot trace")
        if differentiating():
            reasons.append("xformers has a backward pass only, not forward mode or torch.func's derivatives")
        return tuple(reasons)

    def work(self, call: AttendCall) -> Work:
        # Not measured: judged as PyTorch's fused kernel over as many pairs, with the copies of windows.
        if isinstance(call.layout, Blocks):
            return Work("chunked blocks", fetched(call, call.layout))
        return Work("sdpa", pairs(call, call.k.shape[2]))

    def run(self, call: AttendCall) -> AttendResult:
        if not isinstance(call.layout, Blocks):
            rows = (one.transpose(1, 2) for one in (call.q, call.k, call.v))
            return AttendResult(_ops().memory_efficient_attention(*rows, scale=call.scale).transpose(1, 2), None)
        prefix = call.layout.prefix
        out = _windows(call, call.layout)
        if prefix:
            out = torch.cat([global_rows(call, prefix).out, out], dim=2)
        return AttendResult(out, None)


def _layout_reasons(call: AttendCall) -> list[str]:
    layout = call.layout
    reasons = []
    if isinstance(layout, Blocks) and layout.index is not None:
        reasons.append("routed blocks see several runs of keys, and a block-diagonal mask has one for each")
    if isinstance(layout, Blocks) and layout.key_order is not None:
        reasons.append("queries and keys are cut in different ways, which may leave a block without keys")
    if isinstance(layout, Blocks) and layout.order.padded and layout.order.token.shape[:2].numel() > 1:
        reasons.append("windows with empty slots that differ between items or heads have runs of different lengths")
    if layout.key_mask is not None:
        reasons.append("a key mask leaves out keys one by one, which a block-diagonal mask cannot")
    return reasons


class Runs(NamedTuple):
    """Windows as runs of rows, one window after another, without empty slots.

    Attributes:
        queries: token in each row, int64 (B or 1, heads or 1, N).
        keys: token in each row of the keys, where the prefix tokens stand before those of every window.
        place: row of each image token, int64 (B or 1, heads or 1, N).
        lengths: queries of each window, int64 on the CPU; the same for all items and heads.
    """

    queries: Tensor
    keys: Tensor
    place: Tensor
    lengths: Tensor


def runs_of(layout: Blocks) -> Runs:
    """The runs of windows. Where slots are empty it waits for a GPU, of whose numbers it has to know the lengths; for
    windows that depend on sizes only it does so once."""
    key = layout.made_of
    return _runs(layout) if key is None else Runs(*cached(("xformers", key), lambda: _runs(layout)))


def _runs(layout: Blocks) -> Runs:
    token, prefix = layout.order.token, layout.prefix
    count, length = token.shape[2:]
    keys = torch.cat([torch.arange(prefix, device=token.device).expand(*token.shape[:3], -1), token], dim=3)
    lengths = torch.full((count,), length)
    if layout.order.padded:
        lengths = (token[0, 0] >= 0).sum(-1).cpu()
        held = lengths.nonzero().flatten().to(token.device)
        token, keys = token.index_select(2, held), keys.index_select(2, held)
        token, keys, lengths = token[token >= 0], keys[keys >= 0], lengths[lengths > 0]
    queries, keys = (one.reshape(*layout.order.token.shape[:2], -1) for one in (token, keys))
    rows = torch.arange(queries.shape[2], device=token.device).expand_as(queries)
    return Runs(queries, keys, torch.empty_like(queries).scatter(2, queries - prefix, rows), lengths)


def _windows(call: AttendCall, layout: Blocks) -> Tensor:
    """Attention of the image's queries, (B, heads, N, Dv)."""
    runs = runs_of(layout)
    batch, heads = call.q.shape[:2]
    # Items and heads become more windows: (1, B * heads * rows, 1, D).
    q, k, v = (
        _taken(rows, table).reshape(1, -1, 1, rows.shape[3])
        for rows, table in ((call.q, runs.queries), (call.k, runs.keys), (call.v, runs.keys))
    )
    mask = _mask(tuple(runs.lengths.tolist()), batch * heads, layout.prefix, call.q.device)
    out = _ops().memory_efficient_attention(q, k, v, attn_bias=mask, scale=call.scale)
    return _taken(out.view(batch, heads, -1, v.shape[3]), runs.place)


def _taken(rows: Tensor, table: Tensor) -> Tensor:
    """Rows (B, heads, N, D) at a table (B or 1, heads or 1, M) of their numbers."""
    if table.shape[:2].numel() == 1:
        return rows.index_select(2, table[0, 0])
    return rows.gather(2, table[..., None].expand(*rows.shape[:2], -1, rows.shape[3]))


@functools.lru_cache(maxsize=64)
def _mask(lengths: tuple[int, ...], times: int, prefix: int, device: torch.device) -> Any:
    """The block-diagonal mask of some windows, again and again, with the prefix tokens before the keys of each."""
    bias = load_extra("xformers.ops.fmha.attn_bias", extra="xformers", purpose="the xformers backend")
    seen = [one + prefix for one in lengths]
    return bias.BlockDiagonalMask.from_seqlens(list(lengths) * times, seen * times, device=device)


def _ops() -> Any:
    return load_extra("xformers.ops", extra="xformers", purpose="the xformers backend")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("xformers") is not None
