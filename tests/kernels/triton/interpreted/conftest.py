"""What Triton's interpreter cannot do, put right for these tests only; without it, nothing here is collected."""

from __future__ import annotations

import os
import types

import pytest

from attnkit.kernels.triton.version import INTERPRETING

collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """ATTNKIT_PIECE=1/3 keeps every third test, from the second on."""
    piece, _, count = os.environ.get("ATTNKIT_PIECE", "").partition("/")
    if count:
        kept = items[int(piece) :: int(count)]
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % int(count) != int(piece)])
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter():
    """Products of bfloat16 multiply the numbers, not their bit patterns; and Triton 3.6 loops with NumPy 2.4 too."""
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    multiply, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor
    of = interpreter._get_np_dtype

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

    known: dict[str, object] = {}

    def np_dtype(one):
        if one.name not in known:
            known[one.name] = of(one)
        return known[one.name]

    tiles: dict[tuple[object, ...], tl.block_type] = {}

    def block_type(element, shape):
        key = (str(element), *shape)
        if key not in tiles:
            tiles[key] = tl.block_type(element, shape)
        return tiles[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        # The language is put in its place once: Triton would do it again, in milliseconds, at each call of a function.
        visible = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(visible)
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        # So is a table of dtypes, which it makes for each operation.
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        # So are types of tiles.
        patch.setattr(tl.block_type, "with_element_ty", lambda self, element: block_type(element, self.shape))
        patch.setattr(interpreter.InterpreterBuilder, "get_block_ty", lambda self, *given: block_type(*given))
        # Whether integers overflow is computed for each operation too, in half of the time, and told with `debug` only.
        assert not interpreter.interpreter_builder.options.debug
        patch.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)
        yield
        scope.restore()
