"""Constraints: what they promise afterwards, by SVD and eigenvalues, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.training import AWDLSTM, SpectralNormCap, cap_spectral_norm_, cap_spectral_radius_, max_norm_

SHAPES: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}]
KINDS = pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])


def spread(lstm: Any) -> Any:
    """Gates and rows of very different sizes, so that a limit meets some of them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in lstm.parameters():
            if weight.dim() == 2:
                weight.normal_().mul_(torch.logspace(-1.5, 0.5, len(weight))[:, None])
    return lstm


def blocks(lstm: Any, name: str = "weight_hh_l0") -> Tensor:
    weight = getattr(lstm, name).detach()
    return weight.view(4, -1, weight.shape[1])


@KINDS
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_max_norm(kind: Any, options: dict[str, Any]) -> None:
    lstm = spread(kind(4, 5, **options))
    before = copy.deepcopy(lstm.state_dict())
    max_norm_(lstm, {"kernel": 0.5, "recurrent": 1.0})
    for name, value in lstm.state_dict().items():
        if "bias" in name:
            assert torch.equal(value, before[name])
            continue
        limit = 0.5 if "weight_ih" in name else 1.0
        old = before[name].norm(dim=1)
        torch.testing.assert_close(value.norm(dim=1), old.clamp(max=limit))
        assert torch.equal(value[old <= limit], before[name][old <= limit])
        torch.testing.assert_close(nn.functional.normalize(value), nn.functional.normalize(before[name]))


@KINDS
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_spectral_norm(kind: Any, options: dict[str, Any]) -> None:
    lstm = spread(kind(4, 5, **options))
    before = copy.deepcopy(lstm)
    measured = cap_spectral_norm_(lstm, 1.0)
    names = [name for name, _ in lstm.named_parameters() if "weight_hh" in name]
    assert list(measured) == names
    for name in names:
        old = torch.linalg.matrix_norm(blocks(before, name), 2)
        assert old.min() < 1.0 < old.max()
        torch.testing.assert_close(measured[name], old)
        torch.testing.assert_close(torch.linalg.matrix_norm(blocks(lstm, name), 2), old.clamp(max=1.0))
        assert torch.equal(blocks(lstm, name)[old <= 1.0], blocks(before, name)[old <= 1.0])
    others = [name for name in lstm.state_dict() if name not in names]
    assert all(torch.equal(lstm.state_dict()[name], before.state_dict()[name]) for name in others)


@KINDS
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_spectral_radius(kind: Any, options: dict[str, Any]) -> None:
    """Of ``W_hh^k``, or of ``W_hh^k W_hr``, which the recurrence then multiplies by, H x H."""
    lstm = spread(kind(4, 5, **options))

    def radii(name: str) -> Tensor:
        recurrence = blocks(lstm, name)
        if lstm.proj_size:
            recurrence = recurrence @ lstm.weight_hr_l0.detach()
        return torch.linalg.eigvals(recurrence).abs().amax(-1)

    names = [name for name, _ in lstm.named_parameters() if "weight_hh" in name]
    old = {name: radii(name) for name in names}
    measured = cap_spectral_radius_(lstm, 0.5)
    for name in names:
        torch.testing.assert_close(measured[name], old[name], rtol=1e-4, atol=1e-5)
        assert old[name].max() > 0.5
        torch.testing.assert_close(radii(name), old[name].clamp(max=0.5), rtol=1e-4, atol=1e-5)


def test_gates_by_name() -> None:
    lstm = spread(fusedreg.LSTM(4, 5))
    before = torch.linalg.matrix_norm(blocks(lstm), 2)
    cap_spectral_norm_(lstm, {"o": 0.25})
    after = torch.linalg.matrix_norm(blocks(lstm), 2)
    torch.testing.assert_close(after[:3], before[:3])
    torch.testing.assert_close(after[3], torch.tensor(0.25))


@KINDS
def test_power_iteration_follows_the_svd(kind: Any) -> None:
    """Through a training's steps the norms stay at the limit, to a small fraction of it."""
    torch.manual_seed(0)
    lstm = kind(4, 16, num_layers=2)
    cap = SpectralNormCap(lstm, 0.9)
    exact = {name: torch.linalg.matrix_norm(blocks(lstm, name), 2) for name in ("weight_hh_l0", "weight_hh_l1")}
    for name, estimate in cap().items():
        torch.testing.assert_close(estimate, exact[name])
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.5)
    above = []
    for _ in range(60):
        optimizer.zero_grad()
        (-lstm(torch.randn(8, 4, 4))[0].square().mean()).backward()  # what makes the weights grow
        optimizer.step()
        grown = torch.linalg.matrix_norm(blocks(lstm), 2)
        measured = cap()["weight_hh_l0"]
        assert (measured <= grown * (1 + 1e-5)).all()
        above.append(torch.linalg.matrix_norm(blocks(lstm), 2).max() / 0.9)
    assert grown.max() > 0.9
    assert max(above) < 1.02


def test_zeros_and_16_bit() -> None:
    lstm = fusedreg.LSTM(3, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        lstm.weight_hh_l0[:4] = 0
    cap = SpectralNormCap(lstm, 0.1)
    cap()
    cap_spectral_norm_(lstm, 0.1)
    max_norm_(lstm, 0.1)
    assert lstm.weight_hh_l0.isfinite().all() and lstm.weight_hh_l0[:4].eq(0).all()
    assert lstm.weight_hh_l0.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(blocks(lstm).float(), 2).max() < 0.1 * 1.01


@pytest.mark.parametrize("cell", [nn.LSTMCell, fusedreg.LSTMCell])
def test_cells_tied_and_frozen_weights(cell: Any) -> None:
    model = nn.ModuleDict({"cell": spread(cell(3, 4)), "a": spread(nn.LSTM(3, 4)), "b": nn.LSTM(3, 4)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    model["a"].weight_ih_l0.requires_grad_(False)
    frozen = model["a"].weight_ih_l0.clone()
    assert list(cap_spectral_norm_(model, 0.5)) == ["cell.weight_hh", "a.weight_hh_l0"]
    max_norm_(model, 0.01)
    assert torch.equal(model["a"].weight_ih_l0, frozen)
    assert model["cell"].weight_ih.norm(dim=1).max() < 0.0101
    assert model["b"].weight_hh_l0.norm(dim=1).max() < 0.0101


def test_an_optimiser_goes_on() -> None:
    """In place, no graph: the same parameters, and an LSTM's embedding is not touched."""
    model = AWDLSTM(5, 3, 4)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    words = model.encoder.weight.clone()
    max_norm_(model, 0.1)
    cap_spectral_radius_(model, 0.1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad_fn is None for parameter in model.parameters())
    assert torch.equal(model.encoder.weight, words)


def test_bad_arguments() -> None:
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="limit: expected components out of kernel, recurrent, got 'bias'"):
        max_norm_(lstm, {"bias": 1.0})
    with pytest.raises(ValueError, match=r"limit\['kernel'\]: expected a positive finite number, got 0"):
        max_norm_(lstm, 0.0)
    with pytest.raises(ValueError, match="limit: expected gates out of i, f, g, o, got 'c'"):
        cap_spectral_norm_(lstm, {"c": 1.0})
    with pytest.raises(ValueError, match="limit: expected a positive finite number, got -1"):
        cap_spectral_radius_(lstm, -1.0)
    with pytest.raises(ValueError, match="iterations: expected a positive int, got 0"):
        SpectralNormCap(lstm, 1.0, iterations=0)
    with pytest.raises(ValueError, match=r"model: expected a fusedreg\.LSTM, an nn\.LSTM or a cell of these inside"):
        cap_spectral_norm_(nn.Linear(3, 4), 1.0)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    with pytest.raises(ValueError, match="expected weight_hh_l0 to be a plain parameter, got a parametrised one"):
        cap_spectral_norm_(lstm, 1.0)


@pytest.mark.parametrize("constrain", [max_norm_, cap_spectral_norm_, cap_spectral_radius_])
def test_a_refusal_changes_nothing(constrain: Any) -> None:
    model = nn.ModuleList([spread(nn.LSTM(3, 4)), nn.LSTM(3, 4)])
    nn.utils.parametrizations.weight_norm(model[1], "weight_hh_l0")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected 1\.weight_hh_l0 to be a plain parameter"):
        constrain(model, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("constrain", "name"),
    [
        (cap_spectral_norm_, "weight_hh_l0"),
        (SpectralNormCap, "weight_hh_l0"),
        (cap_spectral_radius_, "weight_hh_l0"),
        (cap_spectral_radius_, "weight_hr_l0"),
    ],
)
def test_weights_that_are_not_finite_are_refused(constrain: Any, name: str) -> None:
    """Eigenvalues of a matrix with NaN end the process in some LAPACKs."""
    model = nn.ModuleList([spread(nn.LSTM(3, 4)), nn.LSTM(3, 4, proj_size=2)])
    with torch.no_grad():
        getattr(model[1], name)[1, 1] = float("nan")
    before = model[0].weight_hh_l0.detach().clone()
    with pytest.raises(
        ValueError, match=r"model: expected finite recurrent weights, got NaN or Inf in 1\.weight_hh_l0"
    ):
        constrain(model, 0.1)
    assert torch.equal(model[0].weight_hh_l0, before)
