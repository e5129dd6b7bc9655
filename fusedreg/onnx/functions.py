"""The loop over the steps as ONNX functions. onnxscript compiles this file's text: it is no ordinary Python.

The equations are those of :mod:`fusedreg.reference` in evaluation.
"""

# mypy: ignore-errors
from typing import TypeVar, Union

from onnxscript import DOUBLE, FLOAT, script
from onnxscript import opset18 as op

# onnxscript knows neither the constraints of a TypeVar nor unions by "|", and says so at each import.
Float = TypeVar("Float", bound=Union[FLOAT[...], DOUBLE[...]])  # noqa: UP007


@script(default_opset=op)
def standardised(values: Float, eps: Float) -> Float:
    """Layer norm without gain and shift."""
    centred = values - op.ReduceMean(values, [-1], keepdims=1)
    variance = op.ReduceMean(centred * centred, [-1], keepdims=1)
    return centred / op.Sqrt(variance + eps)


@script(default_opset=op)
def steps(
    terms: Float,
    weight: Float,
    projection: Float,
    projected,
    recurrent_scale,
    recurrent_shift,
    cell_scale,
    cell_shift,
    initial_hidden,
    initial_cell,
    valid,
    reset,
    zoneout_hidden,
    zoneout_cell,
    kept,
    candidate_output,
    recurrent_norm,
    cell_norm,
    eps,
) -> Float:
    """``(T, B, 2P + H)``: every y, h and c, in processed order. Functions cannot call each other here."""
    h = initial_hidden
    c = initial_cell
    zero = eps - eps
    one = zero + 1.0
    outputs = op.SequenceConstruct(op.Concat(h, h, c, axis=1))  # an empty sequence would be one of float32
    for s in range(op.Squeeze(op.Shape(terms, start=0, end=1))):
        runs = op.Unsqueeze(op.Gather(valid, s), [-1])
        begins = op.And(op.Unsqueeze(op.Gather(reset, s), [-1]), runs)
        previous_h = op.Where(begins, zero, h)
        previous_c = op.Where(begins, zero, c)
        a = op.MatMul(previous_h, weight)
        centred = a - op.ReduceMean(a, [-1], keepdims=1)
        deviation = op.Sqrt(op.ReduceMean(centred * centred, [-1], keepdims=1) + eps)
        a = recurrent_norm * (centred / deviation) + (one - recurrent_norm) * a
        a = a * op.Gather(recurrent_scale, s) + op.Gather(recurrent_shift, s)
        i, f, g, o = op.Split(a + op.Gather(terms, s), axis=1, num_outputs=4)
        candidate = (op.Sigmoid(f) * previous_c + op.Sigmoid(i) * op.Tanh(g)) * kept
        centred_cell = candidate - op.ReduceMean(candidate, [-1], keepdims=1)
        cell_deviation = op.Sqrt(op.ReduceMean(centred_cell * centred_cell, [-1], keepdims=1) + eps)
        inner = cell_norm * (centred_cell / cell_deviation) + (one - cell_norm) * candidate
        inner = inner * op.Gather(cell_scale, s) + op.Gather(cell_shift, s)
        candidate_h = op.Sigmoid(o) * op.Tanh(inner)
        if projected:
            candidate_h = op.MatMul(candidate_h, projection)
        else:
            candidate_h = op.Identity(candidate_h)
        new_h = zoneout_hidden * previous_h + (one - zoneout_hidden) * candidate_h
        new_c = zoneout_cell * previous_c + (one - zoneout_cell) * candidate
        y = candidate_output * candidate_h + (one - candidate_output) * new_h
        h = op.Where(runs, new_h, h)
        c = op.Where(runs, new_c, c)
        outputs = op.SequenceInsert(outputs, op.Concat(y, h, c, axis=1))
    every = op.ConcatFromSequence(outputs, axis=0, new_axis=1)
    return op.Slice(every, [1], op.Shape(every, start=0, end=1), [0])
