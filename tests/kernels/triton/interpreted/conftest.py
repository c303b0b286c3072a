"""What Triton's interpreter cannot do, put right for these tests only; without it, nothing here is collected."""

from __future__ import annotations

import pytest

from attnkit.kernels.triton.version import INTERPRETING

collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter():
    """Products of bfloat16 multiply the numbers, not their bit patterns; and Triton 3.6 loops with NumPy 2.4 too."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    def with_index(tensor, *rest):
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        yield
