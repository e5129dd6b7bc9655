"""The functional form: validate once, choose the backend, stack layers and directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedreg import ops, reference, running_statistics, validation
from fusedreg.autocast import autocast
from fusedreg.backends import OPERATORS, resolve
from fusedreg.layer import BatchStatistics, LayerOptions, LayerParameters, LayerResult, RunningStatistics
from fusedreg.packed import pack_like, pad
from fusedreg.parameters import Architecture, grouped, infer_architecture
from fusedreg.recording import LayerCall, Layout, Recorder, Recording
from fusedreg.regularization import BatchNorm, Regularization
from fusedreg.seeds import as_seed, draw_seed


class LSTMResult(NamedTuple):
    """``output, (h_n, c_n)``, as ``nn.LSTM`` returns them."""

    output: Any
    state: tuple[Tensor, Tensor]


class LSTMResultWithCells(NamedTuple):
    """The same, and every cell state of the last layer: ``(T, B, D * H)``, 0 in padding."""

    output: Any
    state: tuple[Tensor, Tensor]
    cell_states: Any


@dataclass(frozen=True)
class Plan:
    """What a call needs to know that is not a tensor: fixed by the hyperparameters and the mode.

    Args:
        architecture: sizes.
        regularization: rates and norm.
        training: draw masks, take batch statistics.
        return_cells: ask the last layer for its cells.
        batch_first: layout of input, output, cells and resets.
        options: one a layer and direction.
    """

    architecture: Architecture
    regularization: Regularization
    training: bool
    return_cells: bool
    batch_first: bool
    options: tuple[LayerOptions, ...]
    draws: bool
    batch_statistics: bool


def make_plan(
    architecture: Architecture,
    regularization: Regularization,
    *,
    training: bool,
    recompute: bool = False,
    return_cells: bool = False,
    batch_first: bool = False,
) -> Plan:
    """Expand the options by layer and direction."""
    last = architecture.num_layers - 1
    options = tuple(
        regularization.layer_options(
            layer, architecture.num_layers, direction, training, recompute, return_cells and layer == last
        )
        for layer, direction in architecture.places()
    )
    return Plan(
        architecture,
        regularization,
        training,
        return_cells,
        batch_first,
        options,
        any(option.draws for option in options),
        training and isinstance(regularization.norm, BatchNorm),
    )


class StackResult(NamedTuple):
    """``LSTMResult``'s parts, time first and batched, and the batch statistics of each layer and direction."""

    output: Tensor
    final_hidden: Tensor
    final_cell: Tensor
    cells: Tensor | None
    statistics: list[BatchStatistics | None]


LayerFunction = Callable[..., LayerResult]

# What runs a layer, by backend.
LAYER_FUNCTIONS: dict[str, LayerFunction] = {
    "reference": reference.lstm_layer,
    **{name: functools.partial(ops.lstm_layer, operators=pair) for name, pair in OPERATORS.items()},
}


def run_stack(
    plan: Plan,
    layer_function: LayerFunction,
    input: Tensor,
    state: tuple[Tensor, Tensor] | None,
    layers: Sequence[LayerParameters],
    running: Sequence[RunningStatistics | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    recording: Recording | None = None,
) -> StackResult:
    """Run every layer and direction over checked tensors, time first.

    Args:
        plan: all that is not a tensor.
        layer_function: one of ``LAYER_FUNCTIONS``.
        input: ``(T, B, I)``.
        state: ``(L * D, B, P)`` and ``(L * D, B, H)``, or ``None`` for zeros.
        layers: parameters by layer and direction.
        running: the same for the running statistics, empty without a batch norm.
        lengths, reset, seed: as ``lstm_layer`` takes them.
        recording: asked for probes before each layer, and shown each layer after.
    """
    dtype, directions = input.dtype, plan.architecture.num_directions
    output, cells = input, None
    hiddens, finals, statistics = [], [], []
    outputs: list[Tensor] = []
    all_cells: list[Tensor] = []
    for place, options in enumerate(plan.options):
        initial: tuple[Tensor | None, Tensor | None] = (None, None)
        if state is not None:
            initial = state[0][place], state[1][place]
        own_seed = seed if plan.draws and options.draws else None
        own_running = running[place] if running else None
        probes = None
        if recording is not None:
            call = LayerCall(input, *initial, layers[place], options, lengths, reset, own_seed, own_running)
            probes = recording.probes(call)
        result = layer_function(
            input,
            *initial,
            layers[place],
            options,
            lengths=lengths,
            reset=reset,
            seed=own_seed,
            running=own_running,
            probes=probes,
        )
        if recording is not None:
            recording.seen(call, result)
        hiddens.append(result.final_hidden)
        finals.append(result.final_cell if result.final_cell.dtype == dtype else result.final_cell.to(dtype))
        statistics.append(result.statistics)
        outputs.append(result.output)
        if result.cells is not None:
            all_cells.append(result.cells)
        if options.direction == directions - 1:
            input = output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            outputs = []
    if all_cells:
        cells = all_cells[0] if directions == 1 else torch.cat(all_cells, -1)
    if len(hiddens) == 1:
        return StackResult(output, hiddens[0][None], finals[0][None], cells, statistics)
    return StackResult(output, torch.stack(hiddens), torch.stack(finals), cells, statistics)


class Call(NamedTuple):
    """What :func:`run` gives: the user's result, what the running statistics are updated from, and the seed."""

    result: LSTMResult | LSTMResultWithCells
    statistics: list[BatchStatistics | None]
    lengths: Tensor | None
    steps: int
    rows: int
    seed: Tensor | None


def run(
    plan: Plan,
    input: Any,
    hx: Any,
    layers: Sequence[LayerParameters],
    running: Sequence[Mapping[str, Tensor]] | None,
    lengths: Any,
    reset: Any,
    seed: Any,
    generator: Any,
    backend: str,
    recorder: Recorder | None = None,
) -> Call:
    """Validate a call, choose its backend, run the stack, and give the results the input's layout.

    The arguments are :func:`lstm`'s; ``running`` holds the buffers of each layer and direction with a batch norm, and
    ``recorder`` is a module's, which watches the call.
    Nothing is written: a call that raises leaves everything as it was.
    """
    architecture = plan.architecture
    if torch._C._is_any_autocast_enabled():
        input, hx, layers = autocast(input, hx, layers)
    weight = layers[0].weight_ih
    packed, host_lengths, batch_first = None, None, plan.batch_first
    if isinstance(input, PackedSequence):
        validation.check_packed(input, lengths)
        packed, batch_first = input, False
        input, host_lengths = pad(packed)
    validation.check_input(input, architecture, weight, batch_first)
    batched = input.dim() == 3
    if not batched:
        x = input.unsqueeze(1)
    else:
        x = input.transpose(0, 1) if batch_first else input
    steps, rows = x.shape[0], x.shape[1]
    state = None
    if hx is not None:
        state = validation.check_state(hx, architecture, input, rows if batched else None)
        if not batched:
            state = state[0].unsqueeze(1), state[1].unsqueeze(1)
    if host_lengths is not None:
        lengths = host_lengths.to(x.device)
    elif lengths is not None:
        lengths = validation.check_lengths(lengths, rows if batched else None, steps, x.device)
    if reset is not None:
        reset = validation.check_reset(reset, tuple(input.shape[:-1]), x.device, architecture.bidirectional)
        if not batched:
            reset = reset.unsqueeze(1)
        elif batch_first:
            reset = reset.transpose(0, 1)
    if plan.batch_statistics:
        validation.check_batch_norm_rows(rows)
    recording = None if recorder is None else recorder.begin(Layout(batched, batch_first, packed, host_lengths))
    layer_function = _layer_function(backend, plan, x)
    statistics_read: list[RunningStatistics | None] = []
    if running is not None:
        statistics_read = [
            running_statistics.read_running(buffers, options, steps, x.dtype, lengths=lengths)
            for buffers, options in zip(running, plan.options, strict=True)
        ]
    seed_tensor = _seed(plan, seed, generator, x.device)

    stack = run_stack(plan, layer_function, x, state, layers, statistics_read, lengths, reset, seed_tensor, recording)
    output: Any
    cells: Any
    output, final_hidden, final_cell, cells, statistics = stack
    if packed is not None and host_lengths is not None:
        output = pack_like(output, host_lengths, packed)
        cells = None if cells is None else pack_like(cells, host_lengths, packed)
    elif not batched:
        output, final_hidden, final_cell = output.squeeze(1), final_hidden.squeeze(1), final_cell.squeeze(1)
        cells = None if cells is None else cells.squeeze(1)
    elif batch_first:
        output = output.transpose(0, 1)
        cells = None if cells is None else cells.transpose(0, 1)
    result: LSTMResult | LSTMResultWithCells = LSTMResult(output, (final_hidden, final_cell))
    if plan.return_cells:
        result = LSTMResultWithCells(output, (final_hidden, final_cell), cells)
    return Call(result, statistics, lengths, steps, rows, seed_tensor)


def _layer_function(backend: str, plan: Plan, input: Tensor) -> LayerFunction:
    norm = plan.regularization.norm
    shared = isinstance(norm, BatchNorm) and norm.process_group is not None
    return LAYER_FUNCTIONS[resolve(backend, input.device, input.dtype, process_group=shared)]


def _seed(plan: Plan, seed: Any, generator: Any, device: torch.device) -> Tensor | None:
    """The caller's seed, or one drawn; ``None`` where no mask is drawn, and then no generator is moved."""
    if generator is not None:
        validation.check_generator(generator, seed)
    if seed is not None:
        return as_seed(seed, device)
    return draw_seed(device, generator=generator) if plan.draws else None


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    parameters: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    num_layers: int = 1,
    batch_first: bool = False,
    bidirectional: bool = False,
    training: bool = False,
    regularization: Regularization | None = None,
    recompute: bool = False,
    lengths: Any = None,
    reset: Tensor | None = None,
    return_cell_states: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    buffers: Mapping[str, Tensor] | None = None,
) -> LSTMResult | LSTMResultWithCells:
    """An LSTM as a function of its parameters: what :class:`fusedreg.LSTM` computes, without the module.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` unbatched, or a ``PackedSequence``.
        hx: ``(h_0, c_0)`` of shapes ``(L * D, B, P)`` and ``(L * D, B, H)``, without ``B`` where unbatched; ``None``
            for zeros. ``c_0`` may be float32 beside 16-bit inputs.
        parameters: a flat sequence in ``list(module.parameters())``'s order, or a mapping by name. Sizes, biases and
            projection are read off them.
        num_layers, batch_first, bidirectional: as in :class:`torch.nn.LSTM`.
        training: whether masks are drawn and batch statistics taken.
        regularization: default: none, which is exactly ``nn.LSTM``.
        recompute, lengths, reset, return_cell_states, seed, generator, backend: as in :class:`fusedreg.LSTM`.
        buffers: with a batch norm, its running statistics by name. They are read and never written: use the module,
            with ``torch.func.functional_call`` where that helps, to have them updated.

    Returns:
        ``output, (h_n, c_n)``, and ``cell_states`` where asked for.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and the remedy.

    Example:
        >>> import torch, fusedreg
        >>> module = torch.nn.LSTM(3, 4)
        >>> input = torch.randn(5, 2, 3)
        >>> output, (h_n, c_n) = fusedreg.functional.lstm(input, None, list(module.parameters()))
        >>> torch.testing.assert_close(output, module(input)[0])
    """
    if regularization is None:
        regularization = Regularization()
    elif not isinstance(regularization, Regularization):
        raise TypeError(
            f"regularization: expected a fusedreg.Regularization or None, got {type(regularization).__name__}; make "
            f"one with fusedreg.Regularization(...)"
        )
    validation.check_size("num_layers", num_layers, 1)
    regularization.check_layers(num_layers)
    architecture, named = infer_architecture(parameters, num_layers, bidirectional, regularization.norm)
    plan = make_plan(
        architecture,
        regularization,
        training=training,
        recompute=recompute,
        return_cells=return_cell_states,
        batch_first=batch_first,
    )
    running = None
    if isinstance(regularization.norm, BatchNorm):
        expected = running_statistics.initial_buffers(architecture, "meta")
        validation.check_buffers(buffers, {name: tuple(value.shape) for name, value in expected.items()})
        running = [running_statistics.layer_buffers(buffers or {}, *place) for place in architecture.places()]
    call = run(plan, input, hx, grouped(architecture, named), running, lengths, reset, seed, generator, backend)
    return call.result
