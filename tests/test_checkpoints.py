"""Other libraries' weights: converted, they compute what the other library's equations compute."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.checkpoints import from_awd_lstm, from_haste, from_keras

INPUT = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def loop(input: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor | None, order: str) -> Tensor:
    """Keras's and Haste's equations: ``z = x kernel + h recurrent_kernel + bias``, the gates in ``order``."""
    size = recurrent.shape[0]
    h = c = input.new_zeros(input.shape[1], size)
    outputs = []
    for x in input:
        z = x @ kernel + h @ recurrent + (0.0 if bias is None else bias)
        gate = {name: z[:, k * size : (k + 1) * size] for k, name in enumerate(order)}
        c = gate["f"].sigmoid() * c + gate["i"].sigmoid() * gate["g"].tanh()
        h = gate["o"].sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def keras(input: Tensor, weights: list[Tensor]) -> Tensor:
    kernel, recurrent, bias = [*weights, None][:3]
    assert kernel is not None
    assert recurrent is not None
    return loop(input, kernel, recurrent, bias, "ifgo")


@pytest.mark.parametrize("bias", [True, False])
def test_keras(bias: bool) -> None:
    layers = [[random(4, 20), random(5, 20), random(20)]]
    weights = [[tensor.numpy() for tensor in layer[: 3 if bias else 2]] for layer in layers]
    module = fusedreg.LSTM(4, 5, bias=bias, dtype=torch.float64)
    module.load_state_dict(from_keras(weights[:1]))
    torch.testing.assert_close(module(INPUT)[0], keras(INPUT, layers[0][: 3 if bias else 2]))
    stacked = from_keras([weights[0], [random(5, 20).numpy(), random(5, 20, seed=1).numpy(), *weights[0][2:]]])
    fusedreg.LSTM(4, 5, 2, bias=bias).load_state_dict(stacked)


def test_keras_both_directions() -> None:
    forward, backward = ([random(4, 20, seed=s), random(5, 20, seed=s), random(20, seed=s)] for s in (1, 2))
    module = fusedreg.LSTM(4, 5, bidirectional=True, dtype=torch.float64)
    module.load_state_dict(from_keras([[tensor.numpy() for tensor in forward + backward]], bidirectional=True))
    expected = torch.cat([keras(INPUT, forward), keras(INPUT.flip(0), backward).flip(0)], -1)
    torch.testing.assert_close(module(INPUT)[0], expected)


def test_haste() -> None:
    state = {"kernel": random(4, 20), "recurrent_kernel": random(5, 20), "bias": random(20)}
    module = fusedreg.LSTM(4, 5, dtype=torch.float64)
    module.load_state_dict(from_haste(state))
    expected = loop(INPUT, state["kernel"], state["recurrent_kernel"], state["bias"], "igfo")
    torch.testing.assert_close(module(INPUT)[0], expected)


@pytest.mark.parametrize("raw_inside", [True, False], ids=["raw-in-module", "raw-beside-module"])
def test_awd_lstm(raw_inside: bool) -> None:
    """The original wrapper puts the raw weight into the wrapped module, a later one beside it, with a dropped copy."""
    plain = {"encoder.weight": random(7, 4)}
    wrapped = dict(plain)
    for layer, sizes in enumerate([(4, 5), (5, 4)]):
        for name, value in nn.LSTM(*sizes).state_dict().items():
            plain[f"rnns.{layer}.{name}"] = value
            if name != "weight_hh_l0":
                wrapped[f"rnns.{layer}.module.{name}"] = value
            elif raw_inside:
                wrapped[f"rnns.{layer}.module.weight_hh_l0_raw"] = value
            else:
                wrapped[f"rnns.{layer}.weight_hh_l0_raw"] = value
                wrapped[f"rnns.{layer}.module.weight_hh_l0"] = value * 0
    result = from_awd_lstm(wrapped)
    assert result.keys() == plain.keys()
    assert all(torch.equal(result[name], value) for name, value in plain.items())
    one = {name.removeprefix("rnns.0."): value for name, value in wrapped.items() if name.startswith("rnns.0.")}
    fusedreg.LSTM(4, 5).load_state_dict(from_awd_lstm(one))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights\[0\]: expected kernel, recurrent kernel and.*got 1 arrays"):
        from_keras([[numpy.zeros((3, 16))]])
    with pytest.raises(ValueError, match=r"forward and then backward, got 3 arrays"):
        from_keras([[numpy.zeros((3, 16))] * 3], bidirectional=True)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected shapes \(I, 4H\).*got \[\(3, 16\), \(5, 16\)\]"):
        from_keras([[numpy.zeros((3, 16)), numpy.zeros((5, 16))]])
    with pytest.raises(ValueError, match="state: expected the entries kernel, recurrent_kernel, bias, got bias"):
        from_haste({"bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"state: expected names such as weight_hh_l0_raw.*got weight_hh_l0"):
        from_awd_lstm({"weight_hh_l0": torch.zeros(4)})
