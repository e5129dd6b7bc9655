"""The gradients of a pair of operators: one ``autograd.Function`` over the forward, one over the backward.

The first one's backward calls the second, whose own backward is the vector-Jacobian product of
:mod:`fusedreg.reference`: a double backward, and any further one, is slow and right. Both have ``setup_context`` and
a vmap rule, so that they work under ``torch.func``. Every pair of operators under the layer's schema gets two
Functions of its own (:class:`Operators`), whichever backend runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fusedreg import batching
from fusedreg.encoding import (
    DIFFERENTIABLE,
    FIRST_RUNNING,
    GRADIENT_GROUPS,
    NUMBER_OF_TENSORS,
    RETURN_CELLS,
    SAVE,
    SAVE_NOTHING,
    decode_options,
    hidden_differs,
)
from fusedreg.layer import LayerOptions, LayerParameters, LayerResult, RunningStatistics
from fusedreg.regularization import BatchNorm

_FORWARD_ARGUMENTS = NUMBER_OF_TENSORS + 3  # rates, options, norm_eps
_SAVED = 7  # what the backward is given of the forward's results; the statistics are the last three
_FIRST_SAVED = 4 + NUMBER_OF_TENSORS
_BACKWARD_ARGUMENTS = _FIRST_SAVED + _SAVED + 4  # rates, options, norm_eps, needed


class Operators:
    """A forward and a backward operator under the layer's schema, and what makes them differentiable.

    Args:
        name: of the pair, ``"namespace::name"``: the operators are ``name_forward`` and ``name_backward``, which are
            registered with torch by now.
    """

    def __init__(self, name: str) -> None:
        namespace, _, base = name.partition("::")
        library = getattr(torch.ops, namespace)
        self.name = name
        self.forward: Callable[..., Any] = getattr(library, f"{base}_forward").default
        self.backward: Callable[..., Any] = getattr(library, f"{base}_backward").default
        # What the operator's own __call__ calls: without a Python frame between.
        self.call_forward: Callable[..., Any] = self.forward._op
        self.layer_backward = _backward_function(self)
        self.layer = _forward_function(self)
        _functions.extend((self.layer, self.layer_backward))


def save_for_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keep what the backward operator reads: the forward's tensors and what it saved."""
    tensors, (rates, options, norm_eps) = inputs[:NUMBER_OF_TENSORS], inputs[NUMBER_OF_TENSORS:]
    y, _, _, cells, hidden, gates, input_gates, *statistics = output
    ctx.rates, ctx.options, ctx.norm_eps = list(rates), list(options), norm_eps
    constants = [hidden, gates, input_gates, *statistics]
    if not options[RETURN_CELLS]:
        constants.append(cells)
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)  # no zeros for the gates, which nobody differentiates
    carried = hidden if hidden_differs(rates, options) else y
    # The running statistics are not kept: what was read of them stands in `statistics`, and a module updates them in
    # place before the backward comes.
    ctx.save_for_backward(*tensors[:FIRST_RUNNING], cells, carried, gates, input_gates, *statistics)


def gradients(operators: Operators, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the forward operator's arguments, by the backward operator."""
    options = ctx.options
    if options[SAVE] == SAVE_NOTHING:
        raise RuntimeError(
            f"{operators.name}_forward: expected options that save for the backward, got save = 0 (nothing) with "
            "an input that requires grad; call fusedreg.ops.lstm_layer, or encode the options with SAVE_GATES"
        )
    output, final_hidden, final_cell, cells = grads[:4]
    if not options[RETURN_CELLS]:
        cells = None
    needed = [ctx.needs_input_grad[position] for position in DIFFERENTIABLE]
    if all(grad is None for grad in (output, final_hidden, final_cell, cells)) or not any(needed):
        return (None,) * _FORWARD_ARGUMENTS
    saved = ctx.saved_tensors
    tensors, results_saved = (*saved[:FIRST_RUNNING], *(None,) * 8), saved[FIRST_RUNNING:]
    again = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    if again:
        # Second derivatives go by way of the tensors alone. With an edge to these results, which gets no gradient, they
        # are right too, but compiled autograd fails to add it to others.
        results_saved = tuple(value.detach() for value in results_saved)
    arguments = (
        (output, final_hidden, final_cell, cells),
        tensors,
        results_saved,
        (ctx.rates, options, ctx.norm_eps, needed),
    )
    flat = [argument for group in arguments for argument in group]
    if again:
        if torch.compiler.is_compiling():  # compiled autograd, perhaps of a forward that was not
            allow_in_graph()
        results = operators.layer_backward.apply(*flat)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            results = operators.backward(*flat)
    gradients: list[Tensor | None] = [None] * _FORWARD_ARGUMENTS
    for position, wanted, result in zip(DIFFERENTIABLE, needed, results, strict=True):
        if wanted:
            gradients[position] = result
    return tuple(gradients)


def _refuse_forward_mode() -> None:
    raise NotImplementedError(
        "fusedreg: expected reverse-mode differentiation, got forward mode (torch.func.jvp, jacfwd, hessian); use "
        "vjp, jacrev, or jacrev(jacrev(...)) for a Hessian, or backend='reference', which has both modes"
    )


class _Operator(torch.autograd.Function):
    """An ``autograd.Function`` whose ``apply`` does not bind its arguments to a signature: 14 of a call's 57 µs."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As ``autograd.Function.apply``, of positional arguments without defaults."""
        if torch._C._are_functorch_transforms_active():
            apply: Any = super().apply  # older torch has no types for it
            return apply(*arguments)
        # Most arguments are None, and of those torch's own way asks whether they are tensors: two microseconds more.
        alive = [
            unwrap_if_dead(argument) if argument is not None and isinstance(argument, Tensor) else argument
            for argument in arguments
        ]
        return super(torch.autograd.Function, cls).apply(*alive)  # type: ignore[misc]


def _forward_function(operators: Operators) -> type[_Operator]:
    """The ``autograd.Function`` over a forward operator; its arguments and results are the operator's."""

    class Layer(_Operator):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # this is the autograd kernel; register_autograd's is Python
                return operators.forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save_for_backward(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(operators, ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return batching.forward_rule(operators, info, in_dims, arguments)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            _refuse_forward_mode()

    return Layer


def _backward_function(operators: Operators) -> type[_Operator]:
    """The ``autograd.Function`` over a backward operator, differentiable once more through the reference."""

    class LayerBackward(_Operator):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operators.backward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save_for_double_backward(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return second_gradients(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return batching.backward_rule(operators, info, in_dims, arguments)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            _refuse_forward_mode()

    return LayerBackward


_functions: list[type[_Operator]] = []


def allow_in_graph() -> bool:
    """Let dynamo put the Functions into its graphs whole, instead of tracing into them.

    It would lose their vmap rules, and their gradients under ``torch.func``. Dynamo *runs* a function that carries
    the mark below while it traces, so that it is not imported (three seconds) before someone compiles.
    """
    for function in _functions:
        torch.compiler.allow_in_graph(function)
    return True


allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def save_for_double_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keep what the reference needs to say the same again: no saved gates, no saved states."""
    ctx.rates, ctx.options, ctx.norm_eps, ctx.needed = inputs[_FIRST_SAVED + _SAVED :]
    ctx.mark_non_differentiable(*(result for result, wanted in zip(output, ctx.needed, strict=True) if not wanted))
    ctx.set_materialize_grads(False)
    statistics = inputs[_FIRST_SAVED + 4 : _FIRST_SAVED + _SAVED]
    ctx.save_for_backward(*inputs[: 4 + FIRST_RUNNING], *statistics)


def second_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients of ``⟨grads, backward(...)⟩``, by differentiating the reference twice."""
    saved = ctx.saved_tensors
    output_grads, tensors = saved[:4], saved[4 : 4 + FIRST_RUNNING]
    wanted = [place for place, grad in enumerate(grads) if grad is not None and ctx.needed[place]]
    if not wanted:
        return (None,) * _BACKWARD_ARGUMENTS
    # Primals: every differentiable tensor there is, then the gradients that came in.
    places = [position for position in DIFFERENTIABLE if tensors[position] is not None]
    given = [place for place, grad in enumerate(output_grads) if grad is not None]

    def of_layer(every: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return _second_gradients_of_layer(ctx, every[: len(saved)], every[len(saved) :], wanted, places, given)

    every = (*saved, *(grads[place] for place in wanted))
    seconds = batching.run_by_model(of_layer, every) if tensors[0].dim() == 4 else of_layer(every)
    gradients: list[Tensor | None] = [None] * _BACKWARD_ARGUMENTS
    for place, second in zip([*(4 + position for position in places), *given], seconds, strict=True):
        gradients[place] = second
    return tuple(gradients)


def _second_gradients_of_layer(
    ctx: Any,
    saved: Sequence[Any],
    grads: Sequence[Tensor | None],
    wanted: Sequence[int],
    places: Sequence[int],
    given: Sequence[int],
) -> tuple[Tensor, ...]:
    """Of one model: the gradients of the arguments in ``places``, then those of the ``given`` incoming gradients.

    ``wanted`` are the places of the backward's results that ``grads`` belong to.
    """
    from fusedreg import reference  # here, so that the operators themselves need torch only

    output_grads, tensors, statistics = saved[:4], list(saved[4 : 4 + FIRST_RUNNING]), saved[4 + FIRST_RUNNING :]
    options, _ = decode_options(ctx.rates, ctx.options, ctx.norm_eps)
    running = statistics_as_running(options, statistics, tensors[0])
    inner = [places.index(DIFFERENTIABLE[place]) for place in wanted]
    groups = max(1, ctx.options[GRADIENT_GROUPS])
    by_group = {DIFFERENTIABLE[place] for place in wanted if groups > 1} & batching.PARAMETERS

    def results(full: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        result = call_layer(reference.lstm_layer, full, options, running)
        four = (result.output, result.final_hidden, result.final_cell, result.cells)
        return tuple(value for place in given if (value := four[place]) is not None)

    def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = list(tensors)
        for position, primal in zip(places, primals, strict=True):
            full[position] = primal
        return results(full) if groups == 1 else batching.run_by_group(results, full, by_group, given, groups)

    def first_gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        values, cotangents = primals[: len(places)], primals[len(places) :]

        def of_inner(*chosen: Tensor) -> tuple[Tensor, ...]:
            replaced = list(values)
            for place, value in zip(inner, chosen, strict=True):
                replaced[place] = value
            return outputs(*replaced)

        chosen = [values[place] for place in inner]
        for n, place in enumerate(inner):
            if places[place] in by_group:  # a parameter for each group has a gradient for each group
                chosen[n] = chosen[n].expand(groups, *chosen[n].shape)
        pullback = torch.func.vjp(of_inner, *chosen)[1]
        return tuple(pullback(cotangents))

    primals = [tensors[position] for position in places] + [output_grads[place] for place in given]
    pullback = torch.func.vjp(first_gradients, *primals)[1]
    return tuple(pullback(tuple(grads)))


def call_layer(
    layer: Callable[..., LayerResult],
    tensors: Sequence[Any],
    options: LayerOptions,
    running: RunningStatistics | None,
) -> LayerResult:
    """Call an implementation of the layer with the operator's tensors."""
    input, *weights = tensors[:6]
    hidden, cell, lengths, reset, seed, *norms = tensors[6 : FIRST_RUNNING - 2]
    return layer(
        input,
        hidden,
        cell,
        LayerParameters(*weights, *norms),
        options,
        lengths=lengths,
        reset=reset,
        seed=seed,
        running=running,
        probes=tensors[FIRST_RUNNING - 2 : FIRST_RUNNING],
    )


def statistics_as_running(
    options: LayerOptions, statistics: Sequence[Tensor], input: Tensor
) -> RunningStatistics | None:
    """The statistics that the forward normalised with, in the form in which the reference reads running ones.

    It reads them in evaluation, and in training at steps with one valid row: exactly where the forward did.
    """
    if not isinstance(options.norm, BatchNorm):
        return None
    index = torch.arange(input.shape[0], device=input.device)
    pairs: list[Tensor | None] = []
    for site, values in zip((options.norm.input, options.norm.recurrent, options.norm.cell), statistics, strict=True):
        pairs += [values[:, 0], values[:, 1]] if site else [None, None]
    pooled = options.norm.input_statistics == "sequence"
    return RunningStatistics(index, torch.zeros_like(index) if pooled else index, *pairs)
