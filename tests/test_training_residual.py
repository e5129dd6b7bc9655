"""Residual stacks: the sum layer by layer, in every layout, for both kinds of LSTM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedreg
from fusedreg import truncated
from fusedreg.training import ResidualLSTM

T, B, I, H = 6, 3, 2, 4


def stack(kind: Any, first: int = 1, **options: Any) -> ResidualLSTM:
    torch.manual_seed(0)
    width = H * (2 if options.get("bidirectional") else 1)
    sizes = [I if first else width, width, width]
    return ResidualLSTM([kind(size, H, dtype=torch.float64, **options) for size in sizes], first=first)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_the_sum(kind: Any, options: dict[str, Any]) -> None:
    module, input = stack(kind, **options), torch.randn(T, B, I, dtype=torch.float64)
    output, state = module(input)
    x, _ = module.layers[0](input)
    for layer in module.layers[1:]:
        x = layer(x)[0] + x
    torch.testing.assert_close(output, x)
    assert len(state) == 3 and len(list(module.parameters())) == 3 * len(list(module.layers[0].parameters()))


def test_from_the_first_layer_on_and_with_a_projection() -> None:
    module = ResidualLSTM([nn.LSTM(3, 5, proj_size=3), nn.LSTM(3, 3)], first=0)
    input = torch.randn(T, B, 3)
    x = module.layers[0](input)[0] + input
    torch.testing.assert_close(module(input).output, module.layers[1](x)[0] + x)


def test_the_state_is_carried() -> None:
    module, input = stack(fusedreg.LSTM), torch.randn(T, B, I, dtype=torch.float64)
    whole, state = module(input)
    first, carried = module(input[:2])
    second, last = module(input[2:], truncated.detach(carried))
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for one, other in zip(last, state, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(part.requires_grad for pair in truncated.detach(carried) for part in pair)
    rows = truncated.reset_rows(carried, torch.tensor([True, False, False]))
    assert all(part[:, 0].eq(0).all() and part[:, 1].ne(0).all() for pair in rows for part in pair)


def test_lengths_and_packed() -> None:
    module, input = stack(fusedreg.LSTM), torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([4, 6, 1])
    padded = input.clone()
    padded[torch.arange(T)[:, None] >= lengths] = float("nan")
    output, _ = module(padded, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(output[:length, row], module(input[:length, row])[0])
        assert output[length:, row].eq(0).all()
    packed, _ = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
    assert isinstance(packed, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output)

    wide = stack(fusedreg.LSTM, first=0)
    padded = torch.full((T, 2, H), float("nan"), dtype=torch.float64)
    padded[:2] = 1.0
    assert wide(padded, lengths=torch.tensor([2, 2])).output[2:].eq(0).all()


def test_regularisers_of_each_layer() -> None:
    module = ResidualLSTM([fusedreg.LSTM(I, H), fusedreg.LSTM(H, H, output_dropout=0.9), nn.LSTM(H, H, 2, dropout=0.5)])
    module(torch.randn(T, B, I)).output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="layers: expected at least one LSTM, got none"):
        ResidualLSTM([])
    with pytest.raises(TypeError, match=r"layers\[1\]: expected a fusedreg\.LSTM or an nn\.LSTM, got GRU"):
        ResidualLSTM([nn.LSTM(2, 4), nn.GRU(4, 4)])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected input_size=4, the width of the layer below, got 8"):
        ResidualLSTM([nn.LSTM(2, 4), nn.LSTM(8, 8)])
    with pytest.raises(
        ValueError, match=r"layers\[1\]: expected an output as wide as its input, 4, .*got 8; .*first=2"
    ):
        ResidualLSTM([nn.LSTM(2, 4), nn.LSTM(4, 8)])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected batch_first as the first layer's"):
        ResidualLSTM([nn.LSTM(2, 4), nn.LSTM(4, 4, batch_first=True)])
    with pytest.raises(ValueError, match="first: expected an index of a layer, got -1"):
        ResidualLSTM([nn.LSTM(2, 4)], first=-1)
    with pytest.raises(ValueError, match=r"lengths: expected None with a torch\.nn\.LSTM among the layers"):
        stack(nn.LSTM)(torch.zeros(T, B, I, dtype=torch.float64), lengths=[1, 2, 3])
    with pytest.raises(ValueError, match=r"state: expected one \(h, c\) a layer, 3 of them, got 1"):
        stack(nn.LSTM)(torch.zeros(T, B, I, dtype=torch.float64), [()])
