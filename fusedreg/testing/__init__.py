"""Cases, inputs and the error budget: how a backend is compared with the float64 reference.

A backend is anything with the signature of :func:`fusedreg.reference.lstm_layer`. It is given the same, already
rounded, inputs as the reference in float64, and for every result and every gradient the relative Frobenius norm
of the difference must satisfy

    err(backend) <= 2 * (err(eager) + floor)

where "eager" is the reference itself in the working type. ``err(eager)`` is the largest over eight seeds and two
orders of summation; ``floor`` is the type's eps, a sixteenth of it for 16-bit types. Tensors under 64 elements
are pooled over the seeds, since the error of a handful of numbers is mostly luck. Beside 16-bit inputs, the
cells stay float32 and are held to ``2 * (err + 1e-5)``. Where the reference is exactly zero, so is the backend.

Example:
    >>> from fusedreg.testing import LayerCase, assert_within_budget, implementation
    >>> report = assert_within_budget(implementation("reference"), LayerCase("plain", steps=3), seeds=2)
    >>> report["output"].error <= report["output"].budget
    True
"""

from __future__ import annotations

from fusedreg.testing.budget import (
    Baseline,
    LayerImplementation,
    Measurement,
    PermutedSums,
    assert_within_budget,
    baseline,
    check_report,
    compare,
    eager_errors,
    implementation,
    measure_errors,
    one_thread,
    relative_error,
    run_layer,
    true_float32,
)
from fusedreg.testing.cases import LayerArguments, LayerCase, make_arguments

__all__ = [
    "Baseline",
    "LayerArguments",
    "LayerCase",
    "LayerImplementation",
    "Measurement",
    "PermutedSums",
    "assert_within_budget",
    "baseline",
    "check_report",
    "compare",
    "eager_errors",
    "implementation",
    "make_arguments",
    "measure_errors",
    "one_thread",
    "relative_error",
    "run_layer",
    "true_float32",
]
