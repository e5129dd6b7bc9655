"""The functional form: validate once, choose the backend, stack layers and directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

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


# So that a program that returns one can be saved (torch.export.save).
for _result in (LSTMResult, LSTMResultWithCells):
    _pytree._register_namedtuple(_result, serialized_type_name=f"fusedreg.{_result.__name__}")


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
        draws: whether some mask is drawn.
        batch_statistics: whether a batch norm takes its statistics from the batch.
        process_group: whether it shares them with other processes.
    """

    architecture: Architecture
    regularization: Regularization
    training: bool
    return_cells: bool
    batch_first: bool
    options: tuple[LayerOptions, ...]
    draws: bool
    batch_statistics: bool
    process_group: bool


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
    norm = regularization.norm
    return Plan(
        architecture,
        regularization,
        training,
        return_cells,
        batch_first,
        options,
        any(option.draws for option in options),
        training and isinstance(norm, BatchNorm),
        isinstance(norm, BatchNorm) and norm.process_group is not None,
    )


# What `run_stack` gives: output, final hiddens and cells, all cells of the last layer, and the batch statistics of each
# layer and direction. A plain tuple: a call of a tiny model is made of such small costs.
StackResult = tuple[Tensor, Tensor, Tensor, Tensor | None, list[BatchStatistics | None]]


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
    cell_type: torch.dtype | None = None,
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
        cell_type: of the final cells; ``None`` for the input's.
    """
    directions = plan.architecture.num_directions
    if cell_type is None:
        cell_type = input.dtype
    hiddens, finals, statistics = [], [], []
    cells = None
    outputs: list[Tensor] = []
    all_cells: list[Tensor] = []
    for place, options in enumerate(plan.options):
        hidden = cell = own_seed = own_running = probes = None
        if state is not None:
            hidden, cell = state[0][place], state[1][place]
        if plan.draws and options.draws:
            own_seed = seed
        if running:
            own_running = running[place]
        if recording is not None:
            call = LayerCall(input, hidden, cell, layers[place], options, lengths, reset, own_seed, own_running)
            probes = recording.probes(call)
        result = layer_function(
            input,
            hidden,
            cell,
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
        output, final_hidden, final_cell, layer_cells, layer_statistics = result
        hiddens.append(final_hidden)
        finals.append(final_cell if final_cell.dtype == cell_type else final_cell.to(cell_type))
        statistics.append(layer_statistics)
        if layer_cells is not None:
            all_cells.append(layer_cells)
        if directions == 2:
            outputs.append(output)
            if options.direction == 0:
                continue
            output = torch.cat(outputs, -1)
            outputs.clear()
        input = output
    if all_cells:
        cells = all_cells[0] if directions == 1 else torch.cat(all_cells, -1)
    if len(hiddens) == 1:
        return output, hiddens[0][None], finals[0][None], cells, statistics
    return output, torch.stack(hiddens), torch.stack(finals), cells, statistics


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
    cast = autocast(input, hx, layers) if torch._C._is_any_autocast_enabled() else None
    if cast is not None:
        input, hx, layers = cast[:3]
    weight = layers[0].weight_ih
    packed, packed_lengths, batch_first = None, None, plan.batch_first
    if isinstance(input, PackedSequence):
        validation.check_packed(input, lengths)
        packed, batch_first = input, False
        input, lengths, packed_lengths = pad(packed)
    shape = validation.check_input(input, architecture, weight, batch_first)
    batched = len(shape) == 3
    if not batched:
        x, steps, rows = input.unsqueeze(1), shape[0], 1
    elif batch_first:
        x, steps, rows = input.transpose(0, 1), shape[1], shape[0]
    else:
        x, steps, rows = input, shape[0], shape[1]
    state = None
    if hx is not None:
        state = validation.check_state(hx, architecture, input, rows if batched else None)
        if not batched:
            state = state[0].unsqueeze(1), state[1].unsqueeze(1)
    if lengths is not None and packed is None:
        lengths = validation.check_lengths(lengths, rows if batched else None, steps, x.device)
    if reset is not None:
        reset = validation.check_reset(reset, tuple(input.shape[:-1]), x.device, architecture.bidirectional)
        if not batched:
            reset = reset.unsqueeze(1)
        elif batch_first:
            reset = reset.transpose(0, 1)
    if plan.batch_statistics:
        validation.check_batch_norm_rows(rows)
    recording = None if recorder is None else recorder.begin(Layout(batched, batch_first, packed, packed_lengths))
    layer_function = LAYER_FUNCTIONS[resolve(backend, x.device, x.dtype, process_group=plan.process_group)]
    statistics_read: list[RunningStatistics | None] = []
    if running is not None:
        statistics_read = [
            running_statistics.read_running(buffers, options, steps, x.dtype, lengths=lengths)
            for buffers, options in zip(running, plan.options, strict=True)
        ]
    seed_tensor = None
    if plan.draws or seed is not None or generator is not None:
        seed_tensor = _seed(plan, seed, generator, x.device)

    output: Any
    cells: Any
    output, final_hidden, final_cell, cells, statistics = run_stack(
        plan,
        layer_function,
        x,
        state,
        layers,
        statistics_read,
        lengths,
        reset,
        seed_tensor,
        recording,
        None if cast is None else cast.cell_type,
    )
    if cast is not None:
        output, final_hidden = output.to(cast.hidden_type), final_hidden.to(cast.hidden_type)
    if packed is not None and packed_lengths is not None:
        output = pack_like(output, packed_lengths, packed)
        cells = None if cells is None else pack_like(cells, packed_lengths, packed)
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
