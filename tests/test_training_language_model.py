"""AWDLSTM: the paper's sizes, ties and rates; a forward by hand; it learns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedreg
from fusedreg import training
from fusedreg.training import AWDLSTM


def test_the_papers_model() -> None:
    """24 million parameters for the Penn Treebank's 10,000 words: 400-1150-1150-400, tied."""
    model = AWDLSTM(10000, device="meta")
    assert [(lstm.input_size, lstm.hidden_size) for lstm in model.lstms] == [(400, 1150), (1150, 1150), (1150, 400)]
    assert model.decoder.weight is model.encoder.weight
    lstms = sum(4 * h * (i + h + 2) for i, h in ((400, 1150), (1150, 1150), (1150, 400)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 10000 * 400 + 10000 + lstms
    rates = [(lstm.regularization.input_dropout, lstm.regularization.output_dropout) for lstm in model.lstms]
    assert rates == [(0.4, 0.25), (0.0, 0.25), (0.0, 0.0)]
    assert {lstm.regularization.weight_dropout for lstm in model.lstms} == {0.5}
    assert (model.locked_dropout.rate, model.embedding_dropout) == (0.4, 0.1)
    untied = AWDLSTM(50, 4, 6, 2, tied=False)
    assert [lstm.hidden_size for lstm in untied.lstms] == [6, 6]
    assert untied.decoder.weight.shape == (50, 6)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = AWDLSTM(200, 30, 40)
    assert model.encoder.weight.abs().max() <= 0.1 and model.encoder.weight.std() > 0.05
    assert model.decoder.bias.eq(0).all()
    assert model.lstms[1].weight_hh_l0.abs().max() <= 40**-0.5


@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_by_hand(tied: bool) -> None:
    """The same layers in nn.LSTM, with the state carried over from another batch."""
    torch.manual_seed(0)
    model = AWDLSTM(20, 5, 7, tied=tied, dtype=torch.float64).eval()
    words = torch.randint(20, (9, 3))
    begun = model(words[:4])
    result = model(words[4:], begun.state)
    x = F.embedding(words, model.encoder.weight)
    for lstm in model.lstms:
        x, _ = lstm.to_torch()(x)
    torch.testing.assert_close(result.undropped, x[4:])
    torch.testing.assert_close(result.dropped, x[4:])
    torch.testing.assert_close(result.logits, x[4:] @ model.decoder.weight.t() + model.decoder.bias)
    assert [tuple(part.shape) for state in result.state for part in state] == [
        (1, 3, lstm.hidden_size) for lstm in model.lstms for _ in range(2)
    ]


def test_unbatched() -> None:
    model = AWDLSTM(20, 5, 7).eval()
    words = torch.randint(20, (6, 2))
    torch.testing.assert_close(model(words[:, 1]).logits, model(words).logits[:, 1])


def test_masks_of_training() -> None:
    """Locked masks on the embedded words, between layers and at the end; other masks at the next call."""
    torch.manual_seed(0)
    model = AWDLSTM(20, 30, 25, regularization=fusedreg.Regularization(output_dropout=(0.3, 0.3, 0.5)))
    words = torch.randint(20, (6, 4))
    seen: list[torch.Tensor] = []
    model.lstms[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    result, other = model(words), model(words)
    for dropped in (seen[0], result.dropped):
        zero = dropped == 0
        assert torch.equal(zero, zero[:1].expand_as(zero)) and 0 < zero[0].sum() < zero[0].numel()
    assert not torch.equal(seen[0] == 0, seen[1] == 0)
    assert not torch.equal(result.dropped == 0, other.dropped == 0)
    assert (result.undropped != 0).all()
    torch.testing.assert_close(result.logits, model.decoder(result.dropped))


def test_another_regularizations_rates_reach_their_layers() -> None:
    regularization = fusedreg.Regularization(
        dropout=(0.1, 0.2, 0.9),
        zoneout_cell=(0.1, 0.2, 0.3),
        hidden_dropout=0.4,
        gate_masks="untied",
        norm=fusedreg.LayerNorm(),
    )
    model = AWDLSTM(20, 5, 7, regularization=regularization)
    assert [lstm.regularization.zoneout_cell for lstm in model.lstms] == [0.1, 0.2, 0.3]
    assert all(lstm.regularization.gate_masks == "untied" for lstm in model.lstms)
    assert all(lstm.regularization.norm == fusedreg.LayerNorm() for lstm in model.lstms)
    assert model.between == [0.1, 0.2, 0.0]
    model(torch.randint(20, (4, 2))).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_between_layer_dropout_acts() -> None:
    torch.manual_seed(0)
    model = AWDLSTM(20, 30, 30, 2, embedding_dropout=0.0, regularization=fusedreg.Regularization(dropout=0.5))
    seen: list[torch.Tensor] = []
    model.lstms[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randint(20, (6, 4)))
    zero = (seen[0] == 0).float()
    assert abs(zero.mean() - 0.5) < 0.1
    assert not torch.equal(zero[0], zero[1])  # anew at each step


def test_lengths_and_resets() -> None:
    torch.manual_seed(0)
    model = AWDLSTM(20, 5, 7).eval()
    words = torch.randint(20, (6, 2))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    torch.testing.assert_close(model(words, reset=reset).logits[3:], model(words[3:]).logits)
    result = model(words, lengths=[6, 2])
    torch.testing.assert_close(result.logits[:2, 1:], model(words[:2, 1:]).logits)
    assert result.undropped[2:, 1].eq(0).all()


def test_it_learns() -> None:
    """The whole recipe, small: the loss on a repeated sequence falls to next to nothing."""
    torch.manual_seed(0)
    pattern = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    streams = training.contiguous_streams(pattern.repeat(41)[:-1], 3)
    model = AWDLSTM(
        10,
        48,
        64,
        2,
        embedding_dropout=0.02,
        regularization=fusedreg.Regularization(weight_dropout=0.1, output_dropout=0.05),
    )
    optimizer = torch.optim.AdamW(training.parameter_groups(model, {"kernel": 1e-4, "recurrent": 1e-5}), lr=0.02)
    draw = training.RandomLength(20, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(14):
        state = None
        for batch in training.StatefulBatches(streams[:-1], streams[1:], steps=draw):
            result = model(batch.input, batch.carry(state))
            state = result.state
            assert batch.target is not None
            loss = F.cross_entropy(result.logits.flatten(0, 1), batch.target.flatten())
            losses.append(loss.item())
            loss = loss + training.activation_regularization(result.dropped, 0.01)
            loss = loss + training.temporal_activation_regularization(result.undropped, 0.01)
            optimizer.zero_grad()
            loss.backward()
            training.clip_gradients(model, 0.5)
            with training.scaled_learning_rate(optimizer, len(batch.input) / draw.length):
                optimizer.step()
    assert losses[0] > 2.0
    assert max(losses[-5:]) < 0.3


@pytest.mark.compile
def test_a_training_step_compiles_whole() -> None:
    """Model, penalties and carried state in one graph; in evaluation the numbers are those of eager mode."""
    torch.manual_seed(0)
    model = AWDLSTM(20, 4, 6, 1)
    words = torch.randint(20, (5, 3))

    def step(
        words: torch.Tensor, state: list[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> tuple[torch.Tensor, list[Any]]:
        result = model(words[:-1], state)
        loss = F.cross_entropy(result.logits.flatten(0, 1), words[1:].flatten())
        loss = loss + training.activation_regularization(result.dropped)
        return loss + training.temporal_activation_regularization(result.undropped), result.state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(words, None)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(words, None), step(words, None))


def test_the_state_dict() -> None:
    model = AWDLSTM(20, 5, 7)
    other = AWDLSTM(20, 5, 7)
    other.load_state_dict(model.state_dict())
    words = torch.randint(20, (4, 2))
    assert torch.equal(model.eval()(words).logits, other.eval()(words).logits)
    names = list(
        itertools.chain(
            *[
                [f"lstms.{layer}.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                for layer in range(3)
            ]
        )
    )
    assert list(model.state_dict()) == ["encoder.weight", *names, "decoder.weight", "decoder.bias"]
    assert isinstance(model.lstms, nn.ModuleList)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="vocabulary_size: expected a positive int, got 0"):
        AWDLSTM(0)
    with pytest.raises(ValueError, match="embedding_dropout: expected a probability"):
        AWDLSTM(5, embedding_dropout=1.0)
    with pytest.raises(ValueError, match="input_dropout"):
        AWDLSTM(5, num_layers=2, regularization=fusedreg.Regularization.awd_lstm(3))
    model = AWDLSTM(5, 2, 3)
    with pytest.raises(ValueError, match=r"state: expected one \(h, c\) a layer, 3 of them, got 1"):
        model(torch.zeros(2, 2, dtype=torch.long), [(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))])
