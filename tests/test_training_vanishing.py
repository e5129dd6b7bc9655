"""Pascanu's Ω against its equation written out gate by gate, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedreg
from fusedreg.layer import LayerOptions, LayerParameters
from fusedreg.training import vanishing_gradient_penalty
from fusedreg.training.vanishing import Transitions, transition_penalty

T, B, I, H = 7, 3, 2, 4


def step_jacobian(lstm: Any, weight_hh: Tensor, x: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
    """``∂h_s/∂h_{s-1}`` at constant ``c_{s-1}`` of one row: the docstring's equation."""
    z = lstm.weight_ih_l0 @ x + weight_hh @ hidden + lstm.bias_ih_l0 + lstm.bias_hh_l0
    i, f, g, o = z.chunk(4)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    tanh_c = (f * cell + i * g).tanh()
    inner = o * (1 - tanh_c**2)
    factors = (inner * g * i * (1 - i), inner * cell * f * (1 - f), inner * i * (1 - g**2), o * (1 - o) * tanh_c)
    return sum(factor[:, None] * block for factor, block in zip(factors, weight_hh.chunk(4), strict=True))  # type: ignore[return-value]


def trajectory(lstm: Any, input: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``h`` and ``c`` before each step and after the last, and ``∂L/∂h`` after each, by a loop over a cell."""
    cell = nn.LSTMCell(I, H, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    state = torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64)
    hiddens, cells = [state[0]], [state[1]]
    for x in input:
        state = cell(x, state)
        hiddens.append(state[0])
        cells.append(state[1])
    gradients = torch.autograd.grad(loss_of(torch.stack(hiddens[1:])), hiddens[1:], allow_unused=True)
    zero = torch.zeros(B, H, dtype=torch.float64)
    deltas = torch.stack([zero if gradient is None else gradient for gradient in gradients])
    return torch.stack(hiddens).detach(), torch.stack(cells).detach(), deltas


def omega(lstm: Any, weight_hh: Tensor, input: Tensor, held: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    hiddens, cells, deltas = held
    total = torch.zeros((), dtype=torch.float64)
    for row in range(B):
        for step in range(1, T):
            delta = deltas[step, row]
            if delta.abs().max() > 0:
                delta = delta / delta.abs().max()  # so that no square is too small for a number
                jacobian = step_jacobian(lstm, weight_hh, input[step, row], hiddens[step, row], cells[step, row])
                total = total + ((delta @ jacobian).norm() / delta.norm() - 1) ** 2
    return total / B


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda output: output[-1].square().sum(),
    "all": lambda output: (output * torch.arange(1.0, 1 + T * B * H, dtype=output.dtype).view(T, B, H)).sin().sum(),
    "middle": lambda output: output[3].sum(),  # nothing reaches the steps after it
    "small": lambda output: output[-1].square().sum() * 1e-200,
}


def case(kind: Any, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    return kind(I, H, dtype=torch.float64, **options), torch.randn(T, B, I, dtype=torch.float64)


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_the_equation_and_finite_differences(kind: Any, loss_name: str) -> None:
    """The gradient is that of Ω as a function of W_hh with the trajectory held."""
    lstm, input = case(kind)
    loss_of = LOSSES[loss_name]
    output, state = lstm(input)
    value = vanishing_gradient_penalty(lstm, loss_of(output), input, (output, state))
    held = trajectory(lstm, input, loss_of)
    weight = lstm.weight_hh_l0.detach().clone()
    torch.testing.assert_close(value, omega(lstm, weight, input, held), rtol=1e-9, atol=1e-12)
    assert value > 0

    value.backward()
    assert [name for name, parameter in lstm.named_parameters() if parameter.grad is not None] == ["weight_hh_l0"]
    torch.manual_seed(0)
    for _ in range(4):
        direction = torch.randn_like(weight)
        step = 1e-5
        ahead, behind = (omega(lstm, weight + sign * step * direction, input, held) for sign in (1, -1))
        torch.testing.assert_close(
            (lstm.weight_hh_l0.grad * direction).sum(), ((ahead - behind) / (2 * step)).detach(), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("norm", [None, fusedreg.LayerNorm()], ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_gradcheck(projected: bool, norm: Any) -> None:
    torch.manual_seed(1)
    lstm = fusedreg.LSTM(I, H, proj_size=2 if projected else 0, norm=norm, dtype=torch.float64)
    width = 2 if projected else H
    draw = {"dtype": torch.float64}
    gradient = nn.functional.normalize(torch.randn(T, B, width, **draw), dim=-1)  # type: ignore[arg-type]
    counts = torch.rand(T, B) < 0.7
    held = Transitions(
        torch.randn(T, B, I, **draw),  # type: ignore[arg-type]
        torch.rand(T, B, width, **draw),  # type: ignore[arg-type]
        torch.randn(T, B, H, **draw),  # type: ignore[arg-type]
        torch.where(counts[..., None], gradient, 0.0),
        counts,
    )
    fields = {name.removesuffix("_l0"): value.detach() for name, value in lstm.named_parameters()}
    recurrent = [fields[name].clone().requires_grad_() for name in ("weight_hh", "weight_hr") if name in fields]

    def penalty(*weights: Tensor) -> Tensor:
        given = fields | dict(zip(("weight_hh", "weight_hr"), weights, strict=False))
        return transition_penalty(held, LayerParameters(**given), LayerOptions(training=False, norm=norm))

    assert torch.autograd.gradcheck(penalty, recurrent)


def penalty_of(lstm: Any, input: Tensor, lengths: Any = None, reset: Any = None, hx: Any = None) -> Tensor:
    named = {name: value for name, value in (("lengths", lengths), ("reset", reset)) if value is not None}
    output, state = lstm(input, hx, **named)
    loss = output.square().sum() + (state[1] * 0.3).sum()
    return vanishing_gradient_penalty(lstm, loss, input, (output, state), hx, **named)


SHAPES: list[dict[str, Any]] = [
    {"num_layers": 2},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 2},
    {"bias": False},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_both_kinds_of_lstm_agree(options: dict[str, Any]) -> None:
    ours, input = case(fusedreg.LSTM, backend="reference", **options)
    theirs = nn.LSTM(I, H, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(penalty_of(ours, input), penalty_of(theirs, input))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_are_rows_of_their_own(bidirectional: bool) -> None:
    """Padding may hold NaN, and a packed sequence gives the same."""
    lstm, input = case(fusedreg.LSTM, num_layers=2, bidirectional=bidirectional)
    lengths = torch.tensor([7, 2, 5])
    padded = input.clone()
    padded[torch.arange(T)[:, None] >= lengths] = float("nan")
    value = penalty_of(lstm, padded, lengths)
    alone = [penalty_of(lstm, input[:length, row : row + 1]) for row, length in enumerate(lengths.tolist())]
    torch.testing.assert_close(value, torch.stack(alone).sum() / B)
    gradient = torch.autograd.grad(value, lstm.weight_hh_l0)[0]
    assert gradient.isfinite().all() and gradient.abs().sum() > 0

    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    output, state = lstm(packed)
    loss = output.data.square().sum() + (state[1] * 0.3).sum()
    torch.testing.assert_close(vanishing_gradient_penalty(lstm, loss, packed, (output, state)), value)


@pytest.mark.parametrize("lengths", [None, [7, 2, 5]], ids=str)
def test_the_reverse_direction_is_the_forward_one_of_the_reversed_input(lengths: list[int] | None) -> None:
    """A loss of the reverse outputs alone: the forward direction's ``δ`` is 0, and nothing of it counts."""
    both, input = case(fusedreg.LSTM, bidirectional=True)
    forward = nn.LSTM(I, H, dtype=torch.float64)
    names = [name for name, _ in forward.named_parameters()]
    forward.load_state_dict({name: getattr(both, name + "_reverse") for name in names})
    output, state = both(input, lengths=lengths)
    factors = torch.randn(T, B, H, dtype=torch.float64)
    value = vanishing_gradient_penalty(
        both, (output[..., H:] * factors).sin().sum(), input, (output, state), lengths=lengths
    )
    alone = []
    for row, length in enumerate(lengths or [T] * B):
        reversed_input = input[:length, row : row + 1].flip(0)
        output, state = forward(reversed_input)
        loss = (output * factors[:length, row : row + 1].flip(0)).sin().sum()
        alone.append(vanishing_gradient_penalty(forward, loss, reversed_input, (output, state)))
    torch.testing.assert_close(value, torch.stack(alone).mean())


def test_resets_begin_anew() -> None:
    lstm, input = case(fusedreg.LSTM)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    whole = penalty_of(lstm, input, reset=reset)
    output, _ = lstm(input[:3])
    first = vanishing_gradient_penalty(lstm, output.square().sum(), input[:3], (output, _))
    torch.testing.assert_close(whole, first + penalty_of(lstm, input[3:]))


def test_layouts() -> None:
    lstm, input = case(fusedreg.LSTM, num_layers=2)
    state = tuple(torch.randn(2, B, H, dtype=torch.float64) for _ in range(2))
    expected = penalty_of(lstm, input, hx=state)
    lstm.batch_first = True
    torch.testing.assert_close(penalty_of(lstm, input.transpose(0, 1), hx=state), expected)
    rows = [penalty_of(lstm, input[:, row], hx=tuple(part[:, row] for part in state)) for row in range(B)]
    torch.testing.assert_close(torch.stack(rows).mean(), expected)


def test_half_precision_is_float32_inside() -> None:
    lstm, input = case(fusedreg.LSTM)
    lstm = lstm.bfloat16()
    wide = fusedreg.LSTM(I, H)
    wide.load_state_dict(lstm.state_dict())
    value = penalty_of(lstm, input.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, penalty_of(wide, input.bfloat16().float()), rtol=0.02, atol=0)
    value.backward()
    assert lstm.weight_hh_l0.grad.dtype == torch.bfloat16


def test_descending_it_keeps_the_gradient_alive() -> None:
    """What it is for: the gradient of a loss at the end reaches the beginning."""
    lstm, _ = case(fusedreg.LSTM)
    input = torch.randn(30, B, I, dtype=torch.float64)

    def reach() -> float:
        probe = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(lstm(probe)[0][-1].square().sum(), probe)
        return float(gradient[0].norm() / gradient[-1].norm())

    before = reach()
    optimizer = torch.optim.SGD([lstm.weight_hh_l0], lr=0.1)
    values = []
    for _ in range(30):
        output, state = lstm(input)
        value = vanishing_gradient_penalty(lstm, output[-1].square().sum(), input, (output, state))
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]
    assert reach() > 10 * before


def test_bad_arguments() -> None:
    lstm, input = case(fusedreg.LSTM)
    result = lstm(input)
    with pytest.raises(TypeError, match=r"lstm: expected a fusedreg\.LSTM or a torch\.nn\.LSTM, got Linear"):
        vanishing_gradient_penalty(nn.Linear(1, 1), result.output.sum(), input, result)
    with pytest.raises(ValueError, match="loss: expected one that was computed from result"):
        vanishing_gradient_penalty(lstm, lstm(input)[0].sum(), input, result)
    with pytest.raises(ValueError, match="loss: expected one that was computed from result"):
        vanishing_gradient_penalty(lstm, torch.zeros(()), input, result)
    with pytest.raises(TypeError, match=r"loss: expected a tensor with one element, got shape"):
        vanishing_gradient_penalty(lstm, result.output, input, result)
    with pytest.raises(TypeError, match=r"result: expected output, \(h_n, c_n\), got Tensor"):
        vanishing_gradient_penalty(lstm, result.output.sum(), input, result.output)
    normed, _ = case(fusedreg.LSTM, norm=fusedreg.BatchNorm(max_steps=T))
    result = normed(input)
    with pytest.raises(ValueError, match="lstm: expected no BatchNorm"):
        vanishing_gradient_penalty(normed, result.output.sum(), input, result)
