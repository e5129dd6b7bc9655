"""Every docstring's example runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fusedreg

MODULES = [fusedreg.__name__, *(module.name for module in pkgutil.walk_packages(fusedreg.__path__, "fusedreg."))]
# Libraries of operators, which are loaded and not imported; and what runs as a program.
SOURCES = [name for name in MODULES if not name.endswith(("._cpu", "._cuda"))]

# What parts of the package need beside torch, and say so themselves.
OPTIONAL = ("triton", "onnx", "onnxscript", "matplotlib", "pandas")


@pytest.mark.parametrize("name", SOURCES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:  # a module of our own that is not found is an error
            raise
        pytest.skip(f"not run: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the examples are small: a team would only wait
    try:
        results = doctest.testmod(module)
    finally:
        torch.set_num_threads(threads)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed, see above"
