"""Norms, updates and spectra of weights, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from eager_layers import H, I, batch, module
from torch import nn
from torch.nn.utils import parametrizations

import fusedreg
from fusedreg.inspect import GATES, Key, WeightTracker, spectra, weight_histograms, weight_maps


@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
def test_a_planted_update(kind: Any) -> None:
    """The forget gate's recurrent block alone is scaled by 1.1: its ratio is 0.1, all others are 0."""
    lstm = kind(I, H)
    block = lstm.weight_hh_l0.data[H : 2 * H]
    before = block.norm().item()
    tracker = WeightTracker(lstm)
    with tracker.measure():
        block *= 1.1
    (step,) = tracker.steps
    key = Key("l0", "recurrent", "f")
    assert step.ratio[key] == pytest.approx(0.1, rel=1e-5)
    assert step.update[key] == pytest.approx(0.1 * before, rel=1e-5)
    assert step.norm[key] == pytest.approx(1.1 * before, rel=1e-5)
    assert {own for own, ratio in step.ratio.items() if ratio != 0} == {key}
    assert {own.component for own in step.norm} == {"kernel", "recurrent", "bias"}


def test_both_biases_are_one_component() -> None:
    lstm = nn.LSTM(I, H)
    tracker = WeightTracker(lstm)
    with tracker.measure():
        pass
    both = torch.cat([lstm.bias_ih_l0[:H], lstm.bias_hh_l0[:H]])
    assert tracker.steps[0].norm[Key("l0", "bias", "i")] == pytest.approx(both.norm().item())


def test_steps_of_an_optimizer() -> None:
    model = nn.ModuleDict({"lstm": module(norm=fusedreg.LayerNorm(), proj_size=2), "head": nn.Linear(2, 2).double()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with WeightTracker(model, optimizer, every=2) as tracker:
        for _ in range(3):
            optimizer.zero_grad()
            model["head"](model["lstm"](batch())[0]).square().sum().backward()
            optimizer.step()
    optimizer.step()
    assert [step.step for step in tracker.steps] == [0, 2]
    assert tracker.labels == ["lstm.l0", "head"]
    last = tracker.steps[-1]
    grad = model["lstm"].weight_ih_l0.grad[:H]
    assert last.update[Key("lstm.l0", "kernel", "i")] == pytest.approx(0.1 * grad.norm().item())
    assert Key("lstm.l0", "recurrent", "") in last.norm and Key("lstm.l0", "norm", "") in last.norm  # W_hr, N_c
    assert Key("head", "other", "") in last.norm and Key("head", "bias", "") in last.norm
    total = sum(value**2 for value in tracker.steps[-1].norm.values())
    assert not optimizer._optimizer_step_pre_hooks and total > 0


def test_parametrised_and_shared_weights() -> None:
    """The weight that a call reads counts, once."""
    lstm = parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    tracker = WeightTracker(nn.ModuleDict({"a": lstm, "b": lstm}))
    with tracker.measure(), torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0 *= 2  # the gain: the weight doubles
    (step,) = tracker.steps
    assert step.ratio[Key("a.l0", "recurrent", "g")] == pytest.approx(1.0, rel=1e-5)
    assert {key.label for key in step.norm} == {"a.l0"}
    other = nn.LSTM(I, H)
    other.weight_hh_l0 = (shared := nn.LSTM(I, H)).weight_hh_l0
    tracker = WeightTracker(nn.ModuleList([shared, other]))
    with tracker.measure():
        pass
    labels = [key.label for key in tracker.steps[0].norm if key.component == "recurrent"]
    assert labels == ["0.l0"] * 4


def test_a_model_without_lstms() -> None:
    tracker = WeightTracker(head := nn.Linear(2, 3))
    with tracker.measure(), torch.no_grad():
        head.weight *= 3
    assert tracker.steps[0].ratio[Key("", "other", "")] == pytest.approx(2.0)
    tracker = WeightTracker(nn.Identity())
    with tracker.measure():
        pass
    assert tracker.steps[0].norm == {} and tracker.labels == []


def test_reading_changes_no_parametrisation() -> None:
    """A spectral norm moves its power iteration on at each reading in training."""
    lstm = parametrizations.spectral_norm(nn.LSTM(I, H), "weight_hh_l0")
    before = {name: value.clone() for name, value in lstm.state_dict().items()}
    tracker = WeightTracker(lstm)
    with tracker.measure():
        spectra(lstm)
        weight_maps(lstm)
    assert all(torch.equal(value, before[name]) for name, value in lstm.state_dict().items())
    assert all(part.training for part in lstm.modules())
    assert not any(tracker.steps[0].update.values())


def test_a_weight_of_zero() -> None:
    lstm = module()
    lstm.bias_ih_l0.data.zero_()
    lstm.bias_hh_l0.data.zero_()
    tracker = WeightTracker(lstm)
    with tracker.measure():
        lstm.bias_ih_l0.data[0] = 1.0
    ratio = tracker.steps[0].ratio
    assert math.isinf(ratio[Key("l0", "bias", "i")]) and math.isnan(ratio[Key("l0", "bias", "f")])


def test_what_a_tracker_refuses() -> None:
    lstm = module()
    with pytest.raises(ValueError, match="every: expected an int of at least 1"):
        WeightTracker(lstm, every=0)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        WeightTracker(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        WeightTracker(lstm, lstm)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="expected an optimizer"):
        WeightTracker(lstm).__enter__()
    with pytest.raises(RuntimeError, match="at least one measured step"):
        WeightTracker(lstm).figure()


class TestSpectra:
    @pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
    def test_a_rotation_that_is_scaled(self, kind: Any) -> None:
        """All singular values of a scaled rotation are its scale, and so is its radius."""
        lstm = kind(I, H)
        rotation = torch.linalg.qr(torch.randn(H, H))[0]
        lstm.weight_hh_l0.data[2 * H : 3 * H] = 0.7 * rotation
        own = spectra(lstm).gates[2]
        assert own.gate == "g" and own.spectral_radius == pytest.approx(0.7, rel=1e-5)
        torch.testing.assert_close(own.singular_values, torch.full((H,), 0.7, dtype=torch.float64), rtol=1e-5, atol=0)

    def test_a_nilpotent_block(self) -> None:
        """The radius is not the norm: a shift has norm 3 and radius 0."""
        lstm = module()
        lstm.weight_hh_l0.data[:H] = 3.0 * torch.diag(torch.ones(H - 1, dtype=torch.float64), 1)
        own = spectra(lstm).gates[0]
        assert own.spectral_norm == pytest.approx(3.0) and own.spectral_radius == pytest.approx(0.0, abs=1e-3)
        assert next(spectra(lstm).rows())["rank"] == H - 1

    def test_a_projection(self) -> None:
        """The square matrix from one projected state to the next."""
        lstm = module(proj_size=2, num_layers=2)
        own = spectra(lstm).gates[5]
        square = lstm.weight_hr_l1 @ lstm.weight_hh_l1[H : 2 * H]
        assert own.place.layer == 1 and own.singular_values.shape == (2,)
        assert own.spectral_radius == pytest.approx(torch.linalg.eigvals(square).abs().max().item())

    def test_not_finite(self) -> None:
        lstm = module()
        lstm.weight_hh_l0.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="expected finite recurrent weights, got NaN or Inf in l0"):
            spectra(lstm)


class TestDistributions:
    def test_every_value_is_counted_once(self) -> None:
        lstm = module(num_layers=2, norm=fusedreg.LayerNorm())
        found = {own.name: own for own in weight_histograms(lstm, bins=7)}
        assert found["l1 weight_hh"].counts.sum(1).tolist() == [H * H] * 4
        assert found["l1 norm_cell_weight"].gates == ("",)
        own, weight = found["l0 weight_ih"], lstm.weight_ih_l0
        assert own.edges[0] == weight.min() and own.edges[-1] == weight.max()
        for number, block in enumerate(weight.chunk(4)):
            for low, high, count in zip(own.edges[:-2], own.edges[1:-1], own.counts[number], strict=False):
                assert int(((block >= low) & (block < high)).sum()) == int(count)

    def test_what_is_not_finite_is_counted_apart(self) -> None:
        lstm = module()
        lstm.weight_ih_l0.data[H, 0] = float("nan")
        own = weight_histograms(lstm)[0]
        assert own.not_finite.tolist() == [0, 1, 0, 0] and own.counts.sum() == 4 * H * I - 1

    def test_maps_are_the_weights(self) -> None:
        lstm = nn.LSTM(I, H, bidirectional=True)
        maps = {own.name: own for own in weight_maps(lstm)}
        assert torch.equal(maps["l0_reverse weight_hh"].values.flatten(0, 1), lstm.weight_hh_l0_reverse)
        assert maps["l0 weight_ih"].channels().shape == (4, H)
        assert all(own.gates == GATES for own in maps.values())

    def test_gradients(self) -> None:
        lstm = module()
        assert weight_maps(lstm, gradients=True) == []
        lstm(batch())[0].sum().backward()
        (_, own) = weight_maps(lstm, gradients=True)
        assert own.name == "l0 dweight_hh" and torch.equal(own.values.flatten(0, 1), lstm.weight_hh_l0.grad)
        with pytest.raises(ValueError, match="which is parametrised"):
            weight_maps(parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0"), gradients=True)

    def test_bins(self) -> None:
        with pytest.raises(ValueError, match="bins: expected an int of at least 1"):
            weight_histograms(module(), bins=0)
