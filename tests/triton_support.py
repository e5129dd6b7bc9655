"""Triton's kernels in the tests: on import, Triton's interpreter is switched on for the rest of the process.

It runs kernels on CPU tensors. ``TRITON_INTERPRET=1`` does that where Triton has not been imported yet; where torch's
compiler, or another test, came first, the functions of Triton's own library have been decorated for a GPU already and
are wrapped anew. What is to be compiled is compiled in a process of its own (``test_triton_compile.py``).

The interpreter reads a function's source when the function is first called, and not when its module is imported: a
kernel's file that is changed while tests run makes them fail in odd ways.
"""

from __future__ import annotations

import os
import types

import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


def _interpret_library() -> None:
    import triton.language as tl
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    knobs.runtime.interpret = True
    wrapped: dict[int, object] = {}
    for module in (tl.standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, wrapped.setdefault(id(value), InterpretedFunction(value.fn)))


_interpret_library()


def _patch_once() -> None:
    """Patch ``triton.language`` for good, and not again at each call from one interpreted function to another.

    The interpreter does that at each of them, which is a third of its time.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    def call(self: InterpretedFunction, *arguments: object, **options: object) -> object:
        return self.rewrite()(*arguments, **options)

    InterpretedFunction.__call__ = call

    # It patches what the globals of a function show it.
    _patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


_patch_once()
