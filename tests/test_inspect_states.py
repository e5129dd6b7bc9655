"""Gates and states: against an LSTM written out step by step, and against what the layers themselves return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_layers import SEED, B, H, I, T, batch, eager_layer, module
from helpers import REGULARIZERS, compiled
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedreg
from fusedreg.inspect import GATES, States, saturation

NAMES = (*GATES, "hidden", "cell")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zoneout": {"zoneout_hidden": 0.3, "zoneout_cell": 0.4},
    "dropout": {"hidden_dropout": 0.3, "weight_dropout": 0.3},
    "layer_norm": {"norm": fusedreg.LayerNorm()},
    "batch_norm": {"norm": fusedreg.BatchNorm(max_steps=T)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [None, [4, T, 2]], ids=["whole", "lengths"])
def test_gates_of_the_loop(options: dict[str, Any], lengths: list[int] | None) -> None:
    if lengths is not None and "norm" in options and isinstance(options["norm"], fusedreg.BatchNorm):
        lengths = [4, T, T]  # a step with one row has no statistics of its own
    lstm, x = module(bidirectional=True, **options), batch()
    with States(lstm) as states:
        lstm(x, lengths=lengths, seed=SEED)
    for layer, end in zip(states.layers, ("_l0", "_l0_reverse"), strict=True):
        gates = eager_layer(lstm, x, end, lengths)[3]["gates"]
        for number, gate in enumerate(GATES):
            torch.testing.assert_close(layer[gate], gates[:, :, number])


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_states_are_those_that_come_back(name: str, training: bool) -> None:
    """h_n, c_n and every cell, with each regulariser."""
    torch.manual_seed(0)
    lstm = fusedreg.LSTM(I, H, 2, dtype=torch.float64, regularization=REGULARIZERS[name], backend="reference")
    x = torch.randn(5, B, I, dtype=torch.float64)
    reset = torch.zeros(5, B, dtype=torch.bool)
    reset[2, 1] = True
    lstm(2 * x)  # a batch norm has statistics then
    with States(lstm.train(training)) as states:
        output, (h_n, c_n), cells = lstm(x, lengths=[5, 3, 5], reset=reset, seed=7, return_cell_states=True)
    lower, upper = states.layers
    torch.testing.assert_close(upper["cell"], cells)
    for layer, hidden, cell in zip((lower, upper), h_n, c_n, strict=True):
        for row, last in enumerate((4, 2, 4)):
            torch.testing.assert_close(layer["hidden"][last, row], hidden[row])
            torch.testing.assert_close(layer["cell"][last, row], cell[row])
    if (lstm.regularization.output_dropout == 0 or not training) and lstm.regularization.zoneout_output == "state":
        torch.testing.assert_close(upper["hidden"], output)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_nn_lstm(proj_size: int, training: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(I, H, 2, bidirectional=True, batch_first=True, proj_size=proj_size).double().train(training)
    x = batch().transpose(0, 1)
    with States(lstm) as states:
        output, (h_n, _) = lstm(x)
    assert torch.equal(output, lstm(x)[0]) and output.requires_grad
    both = torch.cat([layer["hidden"] for layer in states.layers[2:]], -1)
    torch.testing.assert_close(both, output)
    torch.testing.assert_close(states.layers[1]["hidden"][:, 0], h_n[1])
    assert not lstm._forward_hooks


def test_nn_lstm_packed() -> None:
    torch.manual_seed(0)
    lstm, lengths = nn.LSTM(I, H, bidirectional=True).double(), torch.tensor([4, T, 2])
    with States(lstm) as states:
        output, (_, c_n) = lstm(pack_padded_sequence(batch(), lengths, enforce_sorted=False))
    both = torch.cat([layer["hidden"].data for layer in states.layers], -1)
    torch.testing.assert_close(both, output.data)
    torch.testing.assert_close(pad_packed_sequence(states.layers[1]["cell"])[0][0], c_n[1])


def test_nn_lstm_with_masks_that_nobody_knows() -> None:
    lstm = nn.LSTM(I, H, 2, dropout=0.5)
    with States(lstm), pytest.raises(RuntimeError, match=r"got dropout=0.5 in training.*replace_lstms"):
        lstm(batch().float())
    with States(lstm.eval()) as states:
        lstm(input=batch().float(), hx=None)
    assert len(states.layers) == 2


def test_layouts() -> None:
    lstm, x, lengths = module(), batch(), [4, T, 2]
    with States(lstm, keep=1) as states:
        lstm(x, lengths=lengths)
        expected = states.layers[0]
        lstm(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
        packed = states.layers[0]
        lstm(x[:, 1])
        alone = states.layers[0]
    assert [call[0].call for call in states.calls] == [2]
    for name in NAMES:
        assert isinstance(packed[name], PackedSequence)
        torch.testing.assert_close(pad_packed_sequence(packed[name])[0], expected[name])
        torch.testing.assert_close(alone[name], expected[name][:, 1])
        assert (expected[name][2:, 2] == 0).all()
    assert expected.values("f").shape == (sum(lengths), H)
    with pytest.raises(KeyError, match="expected one of i, f, g, o"):
        expected["x"]


@compiled
def test_the_compiled_backend_is_not_touched() -> None:
    made = []
    for watched in (False, True):
        lstm = module(zoneout_cell=0.3, backend="cpu")
        torch.manual_seed(3)
        with States(lstm) if watched else torch.enable_grad():
            output, _ = lstm(batch())
        output.sum().backward()
        made.append([output, lstm.weight_hh_l0.grad])
    assert all(torch.equal(*both) for both in zip(*made, strict=True))


def test_maps_and_histograms() -> None:
    lengths = [4, T, 2]
    with States(lstm := module()) as states:
        lstm(batch(), lengths=lengths)
    (layer,) = states.layers
    gates, hidden, _ = states.maps()
    for t, rows in ((1, [0, 1, 2]), (3, [0, 1]), (5, [1])):
        torch.testing.assert_close(gates.values[2, :, t], layer["g"][t, rows].mean(0))
        torch.testing.assert_close(hidden.values[0, :, t], layer["hidden"][t, rows].mean(0))
    of_gates, of_hidden, of_cells = states.histograms(bins=5)
    assert of_gates.counts.sum(1).tolist() == [sum(lengths) * H] * 4
    assert of_hidden.edges[-1] == layer.values("hidden").max() and of_cells.edges[0] == layer.values("cell").min()
    row = next(own for own in states.rows() if own["name"] == "f" and own["step"] == 3)
    assert row["mean"] == pytest.approx(layer["f"][3, :2].mean().item())


def test_no_call() -> None:
    with States(module()) as states:
        pass
    with pytest.raises(RuntimeError, match="expected a call of the model inside the block"):
        states.layers  # noqa: B018
    with pytest.raises(ValueError, match="keep: expected an int"):
        States(module(), keep=0)


class TestSaturation:
    def states(self, gate: str, bias: float) -> States:
        lstm = module()
        with torch.no_grad():
            for own in lstm.parameters():
                own.zero_()
            lstm.bias_ih_l0[GATES.index(gate) * H + 1] = bias  # one unit alone
        with States(lstm) as states:
            lstm(batch())
        return states

    @pytest.mark.parametrize("gate", GATES)
    def test_a_planted_gate(self, gate: str) -> None:
        for bias, side, other in ((6.0, "right", "left"), (-6.0, "left", "right")):
            (found,) = saturation(self.states(gate, bias)).layers
            assert getattr(found, side)[gate].tolist() == [0, 1, 0, 0]
            assert not getattr(found, other)[gate].any()
            assert not any(found.right[name].any() or found.left[name].any() for name in GATES if name != gate)

    def test_thresholds_and_shares(self) -> None:
        lstm, x = module(), batch()
        with States(lstm) as states:
            lstm(x, lengths=[4, T, 2])
        value = states.layers[0].values("f")
        (found,) = saturation(states, low=0.45, high=0.55).layers
        torch.testing.assert_close(found.left["f"], (value < 0.45).double().mean(0))
        torch.testing.assert_close(found.right["f"], (value > 0.55).double().mean(0))

    def test_dead_units(self) -> None:
        """One unit whose output gate is shut, one stuck at a constant."""
        lstm = module()
        with torch.no_grad():
            lstm.bias_ih_l0[3 * H] = -100.0
            for own in (lstm.weight_ih_l0, lstm.weight_hh_l0):
                own[torch.arange(4) * H + 2] = 0.0
            lstm.bias_ih_l0[H + 2] = -100.0
        with States(lstm) as states:
            lstm(batch())
        (found,) = saturation(states).layers
        assert found.dead.tolist() == [True, False, True, False]
        assert saturation(states.layers, dead=0.0).layers[0].dead.any().item() is False

    def test_thresholds_out_of_order(self) -> None:
        states = self.states("f", 1.0)
        with pytest.raises(ValueError, match="0 <= low < high <= 1"):
            saturation(states, low=0.9, high=0.1)
        with pytest.raises(ValueError, match="dead: expected a standard deviation"):
            saturation(states, dead=-1.0)
