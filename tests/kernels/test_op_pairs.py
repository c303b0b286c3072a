"""How an operator pair is made: schema, fakes, autograd, autocast and FLOPs of a pair made here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnkit.errors import BackendError
from attnkit.kernels.ops.registering import OpPair

SCALE = 2.0


def _fake(q, k, bias, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1])


PAIR = OpPair(
    "product_for_tests",
    arguments="Tensor q, Tensor k, Tensor? bias, float scale",
    outputs=("out", "total"),
    gradients=("q", "k", "bias"),
    lowered=("q", "k"),
    fake=_fake,
    work=lambda q, k, bias, scale: (q.numel(), 3 * q.numel()),
)


def _forward(q, k, bias, scale):
    out = q * k * scale
    return out if bias is None else out + bias, (q + k).sum(-1)


def _backward(grad_out, grad_total, out, total, q, k, bias, scale, needs):
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    more = 0.0 if grad_total is None else grad_total[..., None]
    found = [grad * k * scale + more, grad * q * scale + more, grad]
    given = (q, k, bias)
    return [torch.empty_like(given[at]).copy_(found[at]) for at in range(3) if needs[at]]


PAIR.kernels("CPU", _forward, _backward)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(2, 3, 4, generator=generator, dtype=dtype) for _ in range(3))
    return [one.requires_grad_() for one in made]


# opcheck itself reads the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_pytorch_finds_nothing_wrong():
    q, k, bias = tensors()
    for arguments in ((q, k, bias), (q, k, None), (q.detach(), k, bias), (q.detach(), k.detach(), None)):
        torch.library.opcheck(PAIR.op, (*arguments, SCALE))
    out, total = PAIR.op(q.detach(), k.detach(), None, SCALE)
    given = (None, total, out, total, q.detach(), k.detach(), None, SCALE, [True, False, False])
    torch.library.opcheck(PAIR.backward_op, given)


def test_gradients_of_every_output():
    given = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: PAIR.op(*given, SCALE), given)
    assert torch.autograd.gradcheck(lambda *given: PAIR.op(*given, SCALE)[1], [*given[:2], given[2].detach()])


def test_gradients_of_gradients_are_refused():
    q, k, bias = tensors()
    (grad,) = torch.autograd.grad(PAIR.op(q, k, bias, SCALE)[0].sum(), q, create_graph=True)
    with pytest.raises(BackendError, match="attnkit::product_for_tests has gradients but no gradients of gradients"):
        grad.sum().backward()


def test_under_autocast():
    q, k, bias = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out, total = PAIR.op(q, k, bias, SCALE)
        assert (out.dtype, total.dtype) == (torch.float32, torch.bfloat16)
        assert PAIR.op(q.double(), k.double(), None, SCALE)[1].dtype == torch.float64
        total.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_counted_operations():
    q, k, bias = tensors()
    with FlopCounterMode(display=False) as counter:
        PAIR.op(q, k, bias, SCALE)[0].sum().backward()
    assert counter.get_total_flops() == 2 * (24 + 3 * 24)


def test_compiled_and_exported():
    q, k, bias = tensors()

    def loss(q, k, bias):
        return PAIR.op(q, k, bias, SCALE)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(*[torch.autograd.grad(f(q, k, bias), (q, k, bias)) for f in (loss, compiled)], strict=True):
        assert torch.equal(one, other)

    class Layer(torch.nn.Module):
        def forward(self, q, k):
            return PAIR.op(q, k, None, SCALE)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Layer(), (q.detach(), k.detach()), dynamic_shapes={"q": {0: batch}, "k": {0: batch}})
    more = [torch.cat([one.detach()] * 3) for one in (q, k)]
    assert torch.equal(program.module()(*more)[0], PAIR.op(*more, None, SCALE)[0])
