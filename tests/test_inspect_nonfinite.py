"""A NaN or Inf is planted, and found: layer, gate, step, row, unit and source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_layers import B, H, I, T, batch, module
from helpers import compiled
from torch import nn

import fusedreg
from fusedreg.inspect import GATES, Finding, NonFinite, not_finite_gradients

NAN, INF = float("nan"), float("inf")


def find(lstm: nn.Module, x: torch.Tensor, **call: Any) -> Finding | None:
    with NonFinite(lstm, backward=False) as found:
        lstm(x, **call)
    assert len(found.findings) <= 1
    return found.first


def test_nothing_to_find() -> None:
    lstm = module(num_layers=2)
    with NonFinite(lstm) as found:
        lstm(batch())[0].sum().backward()
    assert found.first is None and list(found.rows()) == [] and not_finite_gradients(lstm) == []


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("field", ["weight_ih", "weight_hh", "bias_hh"])
@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_in_a_weight_of_one_gate(kind: Any, gate: int, field: str) -> None:
    torch.manual_seed(0)
    lstm = kind(I, H, 2)
    weight = getattr(lstm, f"{field}_l1")
    index = (gate * H + 2, 1)[: weight.dim()]
    with torch.no_grad():
        weight[index] = NAN
    found = find(lstm, batch().float())
    assert found is not None
    assert (found.place.label, found.phase, found.stage) == ("l1", "forward", "preactivation")
    assert (found.gates, found.step, found.row, found.unit) == ((GATES[gate],), 0, 0, 2)
    assert found.kind == "NaN" and found.source == f"{field}[{', '.join(map(str, index))}]"


def test_with_a_norm_the_weights_gate_is_named_still() -> None:
    """A layer norm spreads it over all gates."""
    lstm = module(norm=fusedreg.LayerNorm())
    lstm.weight_ih_l0.data[H] = INF
    found = find(lstm, batch())
    assert found is not None and found.gates == ("f",) and found.kind == "Inf"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_in_the_input_at_one_step(value: float) -> None:
    x = batch()
    x[3, 1, 2] = value
    found = find(module(), x)
    assert found is not None
    assert (found.gates, found.step, found.row, found.source) == (GATES, 3, 1, "the input, step 3, row 1, feature 2")
    assert found.kind == ("NaN" if value != value else "Inf")


def test_in_the_input_of_a_batch_norm() -> None:
    """One row's spreads over all rows of the step, and is traced back."""
    x = batch()
    x[3, 1, 2] = NAN
    found = find(module(norm=fusedreg.BatchNorm(max_steps=T)), x)
    assert found is not None and found.step == 3 and found.source == "the input, step 3, row 1, feature 2"


def test_in_the_reverse_direction_the_first_is_the_last_position() -> None:
    x = batch()
    x[[1, 4], 0] = NAN
    lstm = module(bidirectional=True)
    lstm.weight_ih_l0.data.zero_()
    found = find(lstm, x)
    assert found is not None and (found.place.direction, found.step) == (0, 1)  # 0 · NaN is NaN
    with NonFinite(lstm, backward=False) as watch:
        lstm(x.nan_to_num())
        lstm.weight_ih_l0_reverse.data[0, 0] = NAN
        lstm(batch(), lengths=[4, T, 2])
    assert watch.first is not None and watch.first.place.label == "l0_reverse"
    assert (watch.first.call, watch.first.step, watch.first.row) == (1, 3, 0)


def test_in_the_initial_state() -> None:
    h, c = torch.zeros(1, B, H, dtype=torch.float64), torch.zeros(1, B, H, dtype=torch.float64)
    c[0, 2, 1] = INF
    x = batch()
    x[4:, 1] = NAN  # padding, which is not to blame
    found = find(module(), x, hx=(h, c), lengths=[T, 4, T])
    assert found is not None
    assert (found.stage, found.gates, found.step, found.row, found.unit) == ("candidate_cell", (), 0, 2, 1)
    assert found.source == "initial_cell, row 2, unit 1" and found.kind == "Inf"


def test_padding_may_hold_anything() -> None:
    x = batch()
    x[4:, 0] = NAN
    assert find(module(), x, lengths=[4, T, T]) is None


def test_what_arises_from_finite_values() -> None:
    lstm = module(dtype=torch.float32)
    lstm.weight_ih_l0.data[0], lstm.weight_hh_l0.data[0] = -3e38, 3e38
    initial = torch.full((1, B, H), 30.0)
    found = find(lstm, torch.full((T, B, I), 30.0), hx=(initial, initial))  # ∞ - ∞
    assert found is not None and found.gates == ("i",) and "arises there" in found.source


@compiled
def test_under_the_compiled_backend() -> None:
    lstm = module(backend="cpu", zoneout_cell=0.5)
    lstm.weight_hh_l0.data[3 * H] = NAN
    found = find(lstm, batch())
    assert found is not None and (found.gates, found.step, found.unit) == (("o",), 0, 0)


def test_the_backwards_last_step_is_where_it_comes_in() -> None:
    lstm = module(num_layers=2)
    with NonFinite(lstm) as found:
        output = lstm(batch())[0]
        (output[1].sum() + output[3, 2].sum() * INF).backward()
    assert found.first is not None and len(found.findings) == 1
    assert (found.first.place.label, found.first.phase, found.first.step, found.first.row) == ("l1", "backward", 3, 2)
    assert {(label, field) for label, field, _ in not_finite_gradients(lstm)} >= {
        ("l0", "weight_ih"),
        ("l1", "bias_hh"),
    }


def test_raising_at_once() -> None:
    lstm = module()
    lstm.bias_ih_l0.data[0] = NAN
    with (
        NonFinite(lstm, raise_error=True),
        pytest.raises(FloatingPointError, match=r"NaN in the forward of l0.*gate i"),
    ):
        lstm(batch())
    assert lstm._recorder is None


def test_nested_names_and_rows() -> None:
    model = nn.ModuleDict({"encoder": module(), "decoder": module()})
    model["decoder"].bias_ih_l0.data[2 * H] = NAN
    with NonFinite(model, backward=False) as found:
        model["encoder"](batch())
        model["decoder"](batch())
    (row,) = found.rows()
    assert (row["module"], row["layer"], row["gates"], row["step"]) == ("decoder", 0, "g", 0)
    assert str(found.first).startswith("NaN in the forward of decoder.l0, call 0: preactivation, gate g at step 0")
