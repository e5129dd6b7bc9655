"""The operators' schemas in Python, for kernels that are not in a compiled extension.

The schemas of the compiled pair stand in ``csrc/registration.cpp``, so that a compiled package runs without Python; a
test compares the two. A backend whose kernels are launched from Python, Triton's, defines operators of its own with
them: it works where nothing was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedreg.encoding import DIFFERENTIABLE, TENSOR_ARGUMENTS

_REQUIRED = 3  # of the tensor arguments: input and both weights
_FORWARD_RESULTS = ("output", "final_hidden", "final_cell")
# What the backward takes besides: what the forward saved, and the gradients of its results.
SAVED = ("cells", "hidden", "gates", "input_gates", "input_statistics", "recurrent_statistics", "cell_statistics")
INCOMING = ("grad_output", "grad_final_hidden", "grad_final_cell", "grad_cells")
_OPTIONS = ("float[] rates", "int[] options", "float norm_eps")


def _tensors(names: Sequence[str], required: int) -> list[str]:
    return [f"Tensor{'' if place < required else '?'} {name}" for place, name in enumerate(names)]


def _schema(name: str, arguments: Sequence[str], results: Sequence[str]) -> str:
    return f"{name}({', '.join(arguments)}) -> ({', '.join(f'Tensor {result}' for result in results)})"


def forward_schema(name: str) -> str:
    """The schema of a forward operator called ``name`` (without a namespace).

    Example:
        >>> from fusedreg.schemas import forward_schema
        >>> forward_schema("lstm_layer_forward")[:54]
        'lstm_layer_forward(Tensor input, Tensor weight_ih, Ten'
    """
    return _schema(name, [*_tensors(TENSOR_ARGUMENTS, _REQUIRED), *_OPTIONS], (*_FORWARD_RESULTS, *SAVED))


def backward_schema(name: str) -> str:
    """The schema of a backward operator called ``name`` (without a namespace)."""
    arguments = [
        *_tensors(INCOMING, 0),
        *_tensors(TENSOR_ARGUMENTS, _REQUIRED),
        *_tensors(SAVED, len(SAVED)),
        *_OPTIONS,
        "bool[] needed",
    ]
    return _schema(name, arguments, [f"grad_{TENSOR_ARGUMENTS[position]}" for position in DIFFERENTIABLE])


_libraries: list[torch.library.Library] = []  # a library's registrations end with the object


def define_operators(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], dispatch_keys: Sequence[str]
) -> None:
    """Define a pair of operators whose kernels are Python functions. Once a name.

    :func:`fusedreg.ops.register_operators` then completes them.

    Args:
        name: of the pair, ``"namespace::name"``, as in :class:`fusedreg.differentiation.Operators`.
        forward: takes the forward operator's arguments by position, and returns its ten results as a tuple.
        backward: the same for the backward operator and its sixteen.
        dispatch_keys: the devices whose tensors they take: ``"CUDA"``, ``"CPU"``.
    """
    namespace, _, base = name.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    for suffix, schema, kernel in (("forward", forward_schema, forward), ("backward", backward_schema, backward)):
        library.define(schema(f"{base}_{suffix}"))
        for key in dispatch_keys:
            library.impl(f"{base}_{suffix}", kernel, key)
    _libraries.append(library)
