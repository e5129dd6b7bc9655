"""Clipping: torch's own for the whole model, its definition by component, and what is left out is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg.training import AWDLSTM, clip_gradients


class Model(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.lstm = kind(3, 5, num_layers=2, bidirectional=True)
        self.decoder = nn.Linear(10, 4)


def model(kind: Any = nn.LSTM, scale: float = 1.0) -> Model:
    torch.manual_seed(0)
    made = Model(kind)
    made.decoder(made.lstm(torch.randn(6, 3, 3))[0]).square().sum().mul(scale).backward()
    return made


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("kind", [nn.LSTM, fusedreg.LSTM])
@pytest.mark.parametrize(("max_norm", "foreach"), [(0.25, None), (0.25, False), (1e9, True)])
def test_global_clipping_is_torchs(kind: Any, norm_type: float, max_norm: float, foreach: bool | None) -> None:
    ours, theirs = model(kind), model(kind)
    norms = clip_gradients(ours, max_norm, norm_type=norm_type, foreach=foreach)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    torch.testing.assert_close(norms.total, expected)
    for name, value in gradients(ours).items():
        torch.testing.assert_close(value, gradients(theirs)[name])


def test_one_component() -> None:
    ours = model()
    before = gradients(ours)
    norms = clip_gradients(ours, 0.5, components=["recurrent"])
    recurrent = [name for name in before if "weight_hh" in name]
    expected = torch.cat([before[name].flatten() for name in recurrent]).norm()
    assert expected > 0.5
    torch.testing.assert_close(norms.total, expected)
    assert list(norms.components) == ["recurrent"]
    for name, value in gradients(ours).items():
        factor = 0.5 / expected if name in recurrent else 1.0
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-5, atol=1e-7)


def test_a_limit_a_component() -> None:
    ours = model()
    before = gradients(ours)
    norms = clip_gradients(ours, {"recurrent": 0.5, "kernel": 1e9, "bias": 0.1})
    assert set(norms.components) == {"recurrent", "kernel", "bias"}
    torch.testing.assert_close(norms.total, torch.stack(list(norms.components.values())).norm())
    after = gradients(ours)
    biases = torch.cat([value.flatten() for name, value in after.items() if "bias" in name])
    torch.testing.assert_close(biases.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)
    for name, value in after.items():
        if "weight_ih" in name or name == "decoder.weight":
            assert torch.equal(value, before[name])


def test_all_but_the_output_layer() -> None:
    ours = model(scale=100.0)
    before = gradients(ours)
    expected = torch.cat([value.flatten() for name, value in before.items() if "decoder" not in name]).norm()
    norms = clip_gradients(ours, 1.0, exclude=ours.decoder)
    torch.testing.assert_close(norms.total, expected)
    after = gradients(ours)
    assert torch.equal(after["decoder.weight"], before["decoder.weight"])
    rest = torch.cat([value.flatten() for name, value in after.items() if "decoder" not in name]).norm()
    torch.testing.assert_close(rest, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_tied_weights_count_once_and_are_excluded_together() -> None:
    tied = AWDLSTM(7, 3, 4)
    tied(torch.randint(7, (4, 2))).logits.square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in tied.parameters() if p.grad is not None])
    torch.testing.assert_close(clip_gradients(tied, 1e9).total, expected)
    before = gradients(tied)
    norms = clip_gradients(tied, 1e-3, exclude=[tied.decoder])
    assert torch.equal(gradients(tied)["encoder.weight"], before["encoder.weight"])
    assert norms.total < expected


def test_without_gradients() -> None:
    lstm = nn.LSTM(3, 4)
    norms = clip_gradients(lstm, 1.0)
    assert norms.components == {} and norms.total == 0.0
    lstm.weight_hh_l0.grad = torch.full_like(lstm.weight_hh_l0, 3.0)
    assert list(clip_gradients(lstm, 1.0).components) == ["recurrent"]
    torch.testing.assert_close(lstm.weight_hh_l0.grad.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_not_finite() -> None:
    lstm = nn.LSTM(3, 4)
    lstm.weight_hh_l0.grad = torch.full_like(lstm.weight_hh_l0, float("nan"))
    lstm.weight_ih_l0.grad = torch.full_like(lstm.weight_ih_l0, 9.0)
    with pytest.raises(RuntimeError, match=r"expected finite gradients, got norms .*'recurrent': nan"):
        clip_gradients(lstm, 1.0, error_if_nonfinite=True)
    assert lstm.weight_ih_l0.grad.eq(9.0).all()
    assert clip_gradients(lstm, 1.0).total.isnan()


def test_bad_arguments() -> None:
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="components: expected None beside max_norm by component"):
        clip_gradients(lstm, {"kernel": 1.0}, components=["kernel"])
    with pytest.raises(ValueError, match=r"components: expected components out of kernel, .*got 'hidden'"):
        clip_gradients(lstm, 1.0, components=["hidden"])
    with pytest.raises(TypeError, match="components: expected a sequence of names, got the string 'kernel'"):
        clip_gradients(lstm, 1.0, components="kernel")
    with pytest.raises(ValueError, match="exclude: expected modules inside the model, got a Linear outside it"):
        clip_gradients(lstm, 1.0, exclude=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="exclude: expected modules, got str"):
        clip_gradients(lstm, 1.0, exclude="decoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_norm: expected a positive finite number, got 0"):
        clip_gradients(lstm, 0.0)
    with pytest.raises(TypeError, match="model: expected a torch"):
        clip_gradients(list(lstm.parameters()), 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude: expected a module or several, got NoneType"):
        clip_gradients(lstm, 1.0, exclude=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="norm_type: expected a number, got 'inf'"):
        clip_gradients(lstm, 1.0, norm_type="inf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm_type: expected a number above 0, got nan"):
        clip_gradients(lstm, 1.0, norm_type=float("nan"))
