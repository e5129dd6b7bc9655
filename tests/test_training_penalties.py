"""Penalties against their definitions; AR and TAR against a step of AWD-LSTM written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedreg
from fusedreg.training import (
    AWDLSTM,
    activation_regularization,
    activity_l1,
    activity_l2,
    l1_penalty,
    l2_penalty,
    temporal_activation_regularization,
)

# Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_weight_penalties(kind: Any) -> None:
    lstm = kind(3, 4, num_layers=2, bidirectional=True)
    named = dict(lstm.named_parameters())
    strength = {"kernel": 0.1, "recurrent": 0.2}
    for penalty, measure in ((l1_penalty, lambda w: w.abs().sum()), (l2_penalty, lambda w: (w * w).sum())):
        kernels = sum(measure(value) for name, value in named.items() if "weight_ih" in name)
        recurrent = sum(measure(value) for name, value in named.items() if "weight_hh" in name)
        torch.testing.assert_close(penalty(lstm, strength), 0.1 * kernels + 0.2 * recurrent)
        torch.testing.assert_close(penalty(lstm, 0.5), 0.5 * sum(measure(value) for value in named.values()))


def test_the_gradient_of_l2_is_coupled_decay() -> None:
    """SGD's ``weight_decay=d`` is the penalty with strength d / 2."""
    lstm = nn.LSTM(3, 4)
    (gradient,) = torch.autograd.grad(l2_penalty(lstm, {"recurrent": 0.05}), lstm.weight_hh_l0)
    torch.testing.assert_close(gradient, 0.1 * lstm.weight_hh_l0.detach())


def test_a_tied_weight_counts_once() -> None:
    model = AWDLSTM(7, 3, 4)
    torch.testing.assert_close(l2_penalty(model, {"embedding": 1.0}), model.encoder.weight.square().sum())
    assert l2_penalty(model, {"other": 1.0}) == 0.0


def test_a_parametrised_weight_counts_as_it_is_used() -> None:
    lstm = nn.LSTM(3, 4)
    nn.utils.parametrizations.spectral_norm(lstm, "weight_hh_l0").eval()
    value = l2_penalty(lstm, {"recurrent": 1.0})
    torch.testing.assert_close(value, lstm.weight_hh_l0.square().sum())
    value.backward()
    assert lstm.parametrizations.weight_hh_l0.original.grad is not None


def test_sums_of_16_bit_weights_are_float32() -> None:
    lstm = nn.LSTM(64, 64, dtype=torch.bfloat16)
    value = l2_penalty(lstm, {"kernel": 1.0})
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, lstm.weight_ih_l0.float().square().sum())


def test_no_such_component_is_zero() -> None:
    value = l1_penalty(nn.LSTM(3, 4, dtype=torch.float64), {"norm": 1.0})
    assert value == 0.0 and value.dtype == torch.float64


# Activations ------------------------------------------------------------------------------------------------------


def by_hand(output: Tensor, lengths: list[int], reset: Tensor) -> tuple[float, float, float]:
    """Means of |h|, h² and (h_{t+1} - h_t)², element by element, of ``(T, B, F)``."""
    first, second, pairs = [], [], []
    for row, length in enumerate(lengths):
        for step in range(length):
            first += output[step, row].abs().tolist()
            second += output[step, row].square().tolist()
            if step > 0 and not reset[step, row]:
                pairs += (output[step, row] - output[step - 1, row]).square().tolist()
    return tuple(sum(values) / max(len(values), 1) for values in (first, second, pairs))  # type: ignore[return-value]


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 0], [4, 5, 2]], ids=str)
def test_activations_by_hand(lengths: list[int]) -> None:
    """Padding may hold NaN, and its gradient is 0; layouts agree."""
    torch.manual_seed(0)
    output = torch.randn(6, 3, 4, dtype=torch.float64)
    reset = torch.rand(6, 3) < 0.3
    expected = by_hand(output, lengths, reset)
    output[torch.arange(6)[:, None] >= torch.tensor(lengths)] = float("nan")
    output.requires_grad_()
    for batch_first in (False, True):
        laid = output.transpose(0, 1) if batch_first else output
        named: dict[str, Any] = {"lengths": lengths, "batch_first": batch_first}
        values = (
            activity_l1(laid, 3.0, **named),
            activity_l2(laid, 3.0, **named),
            temporal_activation_regularization(
                laid, 3.0, reset=reset.transpose(0, 1) if batch_first else reset, **named
            ),
        )
        torch.testing.assert_close(torch.stack(values) / 3.0, torch.tensor(expected, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(sum(values), output)
        assert gradient.isfinite().all()
        assert gradient[torch.arange(6)[:, None] >= torch.tensor(lengths)].eq(0).all()


def test_packed_and_unbatched() -> None:
    torch.manual_seed(0)
    output, lengths = torch.randn(6, 3, 4), torch.tensor([4, 6, 2])
    packed = pack_padded_sequence(output, lengths, enforce_sorted=False)
    for function in (activity_l1, activity_l2, activation_regularization, temporal_activation_regularization):
        torch.testing.assert_close(function(packed, 2.0), function(output, 2.0, lengths=lengths))
        torch.testing.assert_close(function(output[:, 0], 2.0), function(output[:, :1], 2.0))
        torch.testing.assert_close(
            function(output[:, 0], 2.0, lengths=torch.tensor(4)), function(output[:, :1], 2.0, lengths=[4])
        )


def test_one_step_has_no_difference() -> None:
    assert temporal_activation_regularization(torch.ones(1, 2, 3)) == 0.0


def test_ar_and_tar_of_an_awd_lstm_step() -> None:
    """Loss and gradients of one step against the paper's model, in plain torch with the masks that were drawn."""
    torch.manual_seed(0)
    model = AWDLSTM(11, 4, 6, num_layers=2, embedding_dropout=0.0, regularization=awd_without_weight_drop())
    model = model.double()
    words = torch.randint(11, (6, 3))
    result = model(words)
    loss = activation_regularization(result.dropped) + temporal_activation_regularization(result.undropped)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    # By hand: the one mask that acts, read off where it acted.
    mask = (result.dropped[0] != 0).double() / 0.6
    assert 0 < mask.count_nonzero() < mask.numel()
    torch.testing.assert_close(result.dropped, mask * result.undropped)
    x = model.encoder.weight[words]
    for lstm in model.lstms:
        hidden = cell = torch.zeros(3, lstm.hidden_size, dtype=torch.float64)
        outputs = []
        for step in x:
            gates = step @ lstm.weight_ih_l0.t() + hidden @ lstm.weight_hh_l0.t() + lstm.bias_ih_l0 + lstm.bias_hh_l0
            i, f, g, o = gates.chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        x = torch.stack(outputs)
    expected = 2.0 * (mask * x).pow(2).mean() + 1.0 * (x[1:] - x[:-1]).pow(2).mean()
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def awd_without_weight_drop() -> fusedreg.Regularization:
    return fusedreg.Regularization(output_dropout=(0.0, 0.4))


def test_bad_arguments() -> None:
    output = torch.zeros(5, 2, 3)
    with pytest.raises(ValueError, match="strength: expected components out of kernel"):
        l1_penalty(nn.LSTM(3, 4), {"gate": 1.0})
    with pytest.raises(TypeError, match="model: expected a torch"):
        l2_penalty([], 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strength: expected a non-negative finite number, got -1"):
        activity_l2(output, -1.0)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\), got \(3,\)"):
        activity_l1(output, 1.0, lengths=[1, 2, 3])
    with pytest.raises(
        ValueError, match=r"lengths: expected values in \[0, 5\], the input's steps, got .* from 1 to 6"
    ):
        activity_l1(output, 1.0, lengths=[1, 6])
    with pytest.raises(ValueError, match=r"lengths: expected one number for an unbatched output, got shape \(1,\)"):
        activity_l1(output[:, 0], 1.0, lengths=[3])
    for function in (activity_l1, temporal_activation_regularization):
        with pytest.raises(
            TypeError, match=r"output: expected a tensor or a PackedSequence, got LSTMResult; pass the fi"
        ):
            function(fusedreg.LSTM(3, 4)(output), 1.0)  # type: ignore[arg-type]
    packed = pack_padded_sequence(output, [5, 5])
    for function in (activity_l1, temporal_activation_regularization):
        with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
            function(packed, 1.0, lengths=[5, 5])
    with pytest.raises(ValueError, match=r"output: expected 3 axes, or 2 unbatched, got shape \(5,\)"):
        activation_regularization(output[:, 0, 0])
    with pytest.raises(ValueError, match=r"reset: expected bool of shape \(5, 2\).*got torch.bool of \(2, 5\)"):
        temporal_activation_regularization(output, reset=torch.zeros(2, 5, dtype=torch.bool))
