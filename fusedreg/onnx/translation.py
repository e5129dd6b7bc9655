"""``fusedreg::lstm_layer_forward`` by ONNX operators. Imports onnxscript, so :mod:`fusedreg.onnx` imports it late."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import onnx_ir
from onnxscript import opset18

from fusedreg.encoding import NORM_BATCH, NORM_LAYER, NORM_NONE, NUMBER_OF_TENSORS, TENSOR_ARGUMENTS
from fusedreg.onnx import functions
from fusedreg.regularization import RATE_NAMES

# What onnxscript's operators say of their types does not hold while a graph is recorded.
op: Any = opset18
standardised: Any = functions.standardised
steps: Any = functions.steps

_NUMBER_OF_RESULTS = 10
_IN_TRAINING = "ONNX export: expected a model in evaluation mode, got one in training; call model.eval()"


def layer(*arguments: Any) -> tuple[Any, ...]:
    """``fusedreg::lstm_layer_forward`` by ONNX operators."""
    tensors = dict(zip(TENSOR_ARGUMENTS, arguments[:NUMBER_OF_TENSORS], strict=True))
    rates, options, norm_eps = arguments[NUMBER_OF_TENSORS:]
    *models, gates, output_size = (int(size) for size in tensors["weight_hh"].shape)
    translated = functools.partial(
        _Translation,
        rates=dict(zip(RATE_NAMES, rates, strict=True)),
        options=options,
        norm_eps=norm_eps,
        dtype_name=tensors["input"].dtype.name,
        sizes=(gates // 4, output_size),
    )
    if not models:
        return translated(tensors).results()
    each = [translated(_of_model(tensors, model)).results() for model in range(*models)]
    front = op.Constant(value_ints=[0])
    return tuple(op.Concat(*(op.Unsqueeze(part, front) for part in parts), axis=0) for parts in zip(*each, strict=True))


def _of_model(tensors: dict[str, Any], model: int) -> dict[str, Any]:
    """One model's tensors, out of those that have an axis of models in front."""
    chosen = op.Constant(value_int=model)
    return {name: None if value is None else op.Gather(value, chosen, axis=0) for name, value in tensors.items()}


class _Translation:
    """One layer in one direction, while its graph is recorded."""

    def __init__(
        self,
        tensors: dict[str, Any],
        *,
        rates: dict[str, float],
        options: Sequence[int],
        norm_eps: float,
        dtype_name: str,
        sizes: tuple[int, int],
    ) -> None:
        self.tensors, self.rates, self.norm_eps = tensors, rates, norm_eps
        self.reverse, training, self.candidate = bool(options[1]), options[2], bool(options[6])
        self.kind, self.sites, self.return_cells = options[7], options[8:11], bool(options[12])
        self.dtype = {"FLOAT": numpy.float32, "DOUBLE": numpy.float64}.get(dtype_name)
        if training:
            raise ValueError(_IN_TRAINING)
        if self.dtype is None:
            raise ValueError(
                f"ONNX export: expected float32 or float64, got {dtype_name}; export model.float() and convert the "
                f"ONNX file"
            )
        self.hidden_size, self.output_size = sizes

    def number(self, value: float) -> Any:
        """A constant of the layer's type, unrounded."""
        return op.Constant(value=onnx_ir.tensor(numpy.array(value, self.dtype)))

    def integers(self, *values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def results(self) -> tuple[Any, ...]:
        tensors = self.tensors
        self.steps = op.Shape(tensors["input"], start=0, end=1)
        self.rows = op.Shape(tensors["input"], start=1, end=2)
        self.hidden, self.cell = (
            op.Expand(self.number(0.0), op.Concat(self.rows, self.integers(size), axis=0)) if given is None else given
            for given, size in (
                (tensors["initial_hidden"], self.output_size),
                (tensors["initial_cell"], self.hidden_size),
            )
        )
        self.lengths = self.valid = None
        self.input = tensors["input"]
        if tensors["lengths"] is not None:
            self.lengths = op.Min(op.Max(tensors["lengths"], self.integers(0)), self.steps)
            positions = op.Range(op.Constant(value_int=0), op.Squeeze(self.steps), op.Constant(value_int=1))
            self.valid = op.Less(op.Unsqueeze(positions, self.integers(1)), self.lengths)  # (T, B)
            self.input = op.Where(self._columns(self.valid), self.input, self.number(0.0))  # padding may hold NaN
        acts = any(self.rates[name] for name in ("zoneout_hidden", "zoneout_cell", "cell_dropout"))
        plain = self.kind == NORM_NONE and not acts and not self.return_cells
        plain = plain and tensors["reset"] is None and tensors["weight_hr"] is None
        found = self._node() if plain else self._loop()
        # Nothing of an exported graph reads the rest, which the optimiser takes out again.
        return (*found, *(op.Constant(value_floats=[0.0]) for _ in range(_NUMBER_OF_RESULTS - len(found))))

    def _columns(self, values: Any) -> Any:
        return op.Unsqueeze(values, self.integers(-1))

    def _node(self) -> tuple[Any, ...]:
        """One ``LSTM`` node: its gates are stacked i, o, f, c, and a row of length 0 is left undefined."""
        tensors = self.tensors
        zeros = op.Expand(self.number(0.0), self.integers(4 * self.hidden_size))
        biases = [zeros if tensors[name] is None else tensors[name] for name in ("bias_ih", "bias_hh")]
        leading = self.integers(0)
        lengths = None if self.lengths is None else op.Cast(op.Max(self.lengths, self.integers(1)), to=6)  # int32
        output, hidden, cell = op.LSTM(
            self.input,
            op.Unsqueeze(self._gates_for_node(tensors["weight_ih"]), leading),
            op.Unsqueeze(self._gates_for_node(tensors["weight_hh"]), leading),
            op.Unsqueeze(op.Concat(*[self._gates_for_node(bias) for bias in biases], axis=0), leading),
            lengths,
            op.Unsqueeze(self.hidden, leading),
            op.Unsqueeze(self.cell, leading),
            hidden_size=self.hidden_size,
            direction="reverse" if self.reverse else "forward",
        )
        output = op.Squeeze(output, self.integers(1))
        hidden, cell = op.Squeeze(hidden, leading), op.Squeeze(cell, leading)
        if self.lengths is None:
            return output, hidden, cell
        output = op.Where(self._columns(self.valid), output, self.number(0.0))
        ran = self._columns(op.Greater(self.lengths, self.integers(0)))
        return output, op.Where(ran, hidden, self.hidden), op.Where(ran, cell, self.cell)

    def _gates_for_node(self, value: Any) -> Any:
        i, f, g, o = op.Split(value, axis=0, num_outputs=4)
        return op.Concat(i, o, f, g, axis=0)

    def _loop(self) -> tuple[Any, ...]:
        tensors = self.tensors
        terms = op.MatMul(self._ordered(self.input), op.Transpose(tensors["weight_ih"], perm=[1, 0]))
        if self.sites[0]:
            scale, shift = self._affine("input", "running_input_index")
            moments = [self.integers(1)] if self.kind == NORM_BATCH else []
            if self.kind == NORM_LAYER:
                terms = standardised(terms, self.number(self.norm_eps))
            scale, shift = (op.Unsqueeze(value, *moments) if moments else value for value in (scale, shift))
            terms = op.Add(op.Mul(terms, scale), shift)
        for name in ("bias_ih", "bias_hh"):
            if tensors[name] is not None:
                terms = op.Add(terms, tensors[name])
        every = op.Concat(self.steps, self.rows, axis=0)
        true, false = (op.Cast(op.Constant(value_int=value), to=9) for value in (1, 0))
        valid = op.Expand(true, every) if self.valid is None else self.valid
        reset = op.Expand(false, every) if tensors["reset"] is None else tensors["reset"]
        layer_norm = self.kind == NORM_LAYER
        projected = tensors["weight_hr"] is not None
        states = steps(
            terms,
            op.Transpose(tensors["weight_hh"], perm=[1, 0]),
            op.Transpose(tensors["weight_hr" if projected else "weight_hh"], perm=[1, 0]),
            true if projected else false,
            *self._per_step("recurrent", self.sites[1]),
            *self._per_step("cell", self.sites[2]),
            self.hidden,
            self.cell,
            valid,
            reset,
            self.number(self.rates["zoneout_hidden"]),
            self.number(self.rates["zoneout_cell"]),
            self.number(1.0 - self.rates["cell_dropout"]),
            self.number(float(self.candidate)),
            self.number(float(layer_norm and self.sites[1])),
            self.number(float(layer_norm and self.sites[2])),
            self.number(self.norm_eps if layer_norm else 1.0),  # divides also where its result is not used
        )
        ends = (0, self.output_size, 2 * self.output_size, 2 * self.output_size + self.hidden_size)
        output, hidden, cell = (
            op.Slice(states, self.integers(begin), self.integers(end), self.integers(2))
            for begin, end in itertools.pairwise(ends)
        )
        last = op.Constant(value_int=-1)
        finals = op.Gather(hidden, last, axis=0), op.Gather(cell, last, axis=0)
        if self.valid is not None:
            columns = self._columns(self.valid)
            output, cell = (op.Where(columns, value, self.number(0.0)) for value in (output, cell))
        return (self._ordered(output), *finals, self._ordered(cell))

    def _ordered(self, values: Any) -> Any:
        """By position into processed order, or back again: padding stays where it is."""
        if not self.reverse:
            return values
        if self.lengths is None:
            lengths = op.Expand(self.steps, self.rows)
        else:  # one step turned round is none; rows of length 0 onnxruntime 1.23 leaves undefined
            lengths = op.Max(self.lengths, self.integers(1))
        return op.ReverseSequence(values, lengths, batch_axis=1, time_axis=0)

    def _affine(self, site: str, index: str) -> tuple[Any, Any]:
        """What a norm multiplies with and adds: (T, N) of a batch norm, (N,) of a layer norm."""
        weight, bias = self.tensors[f"norm_{site}_weight"], self.tensors[f"norm_{site}_bias"]
        if self.kind == NORM_LAYER:
            return weight, bias
        # An index of -1 stands for mean 0 and variance 1.
        rows = self.tensors[index]
        known = self._columns(op.GreaterOrEqual(rows, self.integers(0)))
        row = op.Max(rows, self.integers(0))
        mean, var = (
            op.Where(known, op.Gather(self.tensors[f"running_{site}_{name}"], row, axis=0), self.number(default))
            for name, default in (("mean", 0.0), ("var", 1.0))
        )
        scale = op.Div(weight, op.Sqrt(op.Add(var, self.number(self.norm_eps))))
        shift = op.Neg(op.Mul(mean, scale))
        return scale, shift if bias is None else op.Add(shift, bias)

    def _per_step(self, site: str, on: int) -> tuple[Any, Any]:
        """The same with a row for every step; one that does nothing where the norm is off."""
        shape = op.Concat(self.steps, self.integers(1), axis=0)
        if not on:
            return op.Expand(self.number(1.0), shape), op.Expand(self.number(0.0), shape)
        scale, shift = self._affine(site, "running_index")
        if self.kind == NORM_BATCH:
            return scale, shift
        return op.Expand(scale, shape), op.Expand(shift, shape)


def draw_seed(device: Any, rank: int = 0) -> Any:
    """``fusedreg::draw_seed``, which a model in evaluation does not call."""
    raise ValueError(_IN_TRAINING)


def cummax(values: Any, dim: int) -> tuple[Any, Any]:
    """``aten::cummax`` of a vector: by comparing each element with all before it."""
    if len(values.shape) != 1:
        raise ValueError(f"ONNX export: expected a vector for cummax, got {len(values.shape)} dimensions")
    count = op.Squeeze(op.Shape(values, start=0, end=1))
    positions = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    before = op.LessOrEqual(positions, op.Unsqueeze(positions, op.Constant(value_ints=[1])))
    smallest = op.ReduceMin(values, op.Constant(value_ints=[0]), keepdims=1)
    table = op.Where(before, values, smallest)
    return op.ReduceMax(table, op.Constant(value_ints=[1]), keepdims=0), op.ArgMax(table, axis=1, keepdims=0)
