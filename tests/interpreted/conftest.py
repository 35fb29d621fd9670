"""Tests in Triton's interpreter, which replaces Triton when it is imported: they need a separate process.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

tests/generation/test_triton.py runs them like this. Three properties of Triton 3.6's interpreter are changed here. It
patches triton.language at every call of a function in a kernel, 1 ms each: once per process is enough. Its `dot`
multiplies bf16 numbers as the integers of their bits, and a cast of integers to bf16 keeps the bits.

On a GPU they run compiled, with the marker `gpu`:  python -m pytest tests/interpreted -m gpu
"""

import inspect
import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


def patch_language_once(interpreter, language):
    patch, patched = interpreter._patch_lang, set()

    def patch_unless_done(function):
        modules = {id(one) for one in function.__globals__.values() if inspect.ismodule(one)}
        modules &= {id(language), id(language.core)}
        if not modules <= patched:
            patch(function)
            patched.update(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_unless_done


def repair_bf16(interpreter, language):
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def dot_of_fp32(self, a, b, *arguments):
        wide = [cast(self, one, language.float32) if one.dtype.scalar == language.bfloat16 else one for one in (a, b)]
        return dot(self, *wide, *arguments)

    def cast_through_fp32(self, source, kind):
        if kind.scalar == language.bfloat16 and source.dtype.scalar.is_int():
            source = cast(self, source, language.float32)
        return cast(self, source, kind)

    builder.create_dot, builder.cast_impl = dot_of_fp32, cast_through_fp32


if INTERPRETED:
    import triton
    import triton.language
    from triton.runtime import interpreter

    patch_language_once(interpreter, triton.language)
    repair_bf16(interpreter, triton.language)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Large tiles, because the interpreter's time depends on the number of programs; and a fixed seed."""
    from megatron_cm3leon.generation import products

    def choose(rows, units, width, itemsize):
        return products.Tile(min(256, triton.next_power_of_2(units)), min(512, triton.next_power_of_2(width)))

    if INTERPRETED:
        monkeypatch.setattr(products, "choose_tile", choose)
    torch.manual_seed(0)
