"""Triton's kernels in the tests: on import, Triton's interpreter is switched on for the rest of the process.

It runs kernels on CPU tensors. ``TRITON_INTERPRET=1`` does that where Triton has not been imported yet; where torch's
compiler, or another test, came first, the functions of Triton's own library have been decorated for a GPU already and
are wrapped anew. What is to be compiled is compiled in a process of its own (``test_triton_compile.py``).
"""

from __future__ import annotations

import os

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
