"""NT-ASGD: the trigger against the algorithm on made-up losses, the average against its definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg.training import AWDLSTM, NonMonotonicTrigger, ParameterAverage


def first_trigger(losses: list[float], n: int, rule: str) -> int | None:
    """Algorithm 1 of the paper, with its ``t`` and ``logs``, or with the released code's window."""
    logs: list[float] = []
    for k, v in enumerate(losses):
        t = len(logs)
        if t > n:
            window = logs[: t - n] if rule == "released" else [logs[index] for index in range(t - n, t)]
            if v > min(window):
                return k
        logs.append(v)
    return None


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_the_algorithm_on_made_up_curves(rule: Any, patience: int) -> None:
    draw = random.Random(0)
    fired = set()
    for case in range(40):
        slope = draw.choice([0.0, 0.02, 0.1])
        losses = [5.0 - slope * step + draw.gauss(0, 0.05) for step in range(30)]
        expected = first_trigger(losses, patience, rule)
        trigger = NonMonotonicTrigger(patience, rule=rule)
        answers = [trigger.step(loss) for loss in losses]
        assert answers == [expected is not None and step >= expected for step in range(30)], case
        fired.add(expected)
    assert len(fired) > 2


def test_a_falling_curve_never_triggers_and_a_trigger_stays() -> None:
    trigger = NonMonotonicTrigger(3)
    assert not any(trigger.step(torch.tensor(10.0 - step)) for step in range(50))
    assert trigger.step(20.0)
    assert trigger.step(-100.0) and trigger.triggered


def test_a_trigger_goes_on_from_a_checkpoint() -> None:
    losses = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2]
    whole, before = NonMonotonicTrigger(2), NonMonotonicTrigger(2)
    answers = [whole.step(loss) for loss in losses]
    for loss in losses[:4]:
        before.step(loss)
    after = NonMonotonicTrigger(2)
    after.load_state_dict(before.state_dict())
    assert [after.step(loss) for loss in losses[4:]] == answers[4:]
    assert after.state_dict() == whole.state_dict()


def steps(model: nn.Module, average: ParameterAverage, count: int) -> list[list[torch.Tensor]]:
    seen = []
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
    return seen


def test_the_average_is_the_mean() -> None:
    torch.manual_seed(0)
    lstm = fusedreg.LSTM(3, 4)
    average = ParameterAverage(lstm)
    seen = steps(lstm, average, 7)
    assert average.count == 7
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    with average.applied():
        for index, parameter in enumerate(lstm.parameters()):
            torch.testing.assert_close(parameter.detach(), torch.stack([one[index] for one in seen]).mean(0))
    with pytest.raises(KeyError), average.applied():
        raise KeyError  # the parameters come back all the same
    for parameter, last in zip(lstm.parameters(), seen[-1], strict=True):
        assert torch.equal(parameter, last)
    assert optimizer.param_groups[0]["params"][0] is lstm.weight_ih_l0


def test_it_is_torchs_asgd() -> None:
    """AWD-LSTM's optimiser after the trigger: ``ASGD(t0=0, lambd=0)``'s ``ax``, which forgets its first step."""
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4)
    optimizer = torch.optim.ASGD(lstm.parameters(), lr=0.5, t0=0, lambd=0.0)
    average = ParameterAverage(lstm)
    for step in range(5):
        optimizer.zero_grad()
        lstm(torch.randn(4, 2, 3))[0].square().mean().backward()
        optimizer.step()
        if step > 0:
            average.update()
    with average.applied():
        for parameter in lstm.parameters():
            torch.testing.assert_close(parameter.detach(), optimizer.state[parameter]["ax"])


def test_16_bit_means_move() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    average = ParameterAverage([parameter])
    average.update()
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(4095):
        average.update()
    torch.testing.assert_close(average.means[0], torch.tensor([4095 / 4096]))


def test_checkpoints_and_tied_weights() -> None:
    torch.manual_seed(0)
    model = AWDLSTM(5, 3, 4)
    average = ParameterAverage([*model.encoder.parameters(), *model.parameters()])
    assert len(average.parameters) == len(list(model.parameters()))
    steps(model, average, 3)
    other = ParameterAverage(average.parameters)
    other.load_state_dict(average.state_dict())
    average.update()
    other.update()
    assert other.count == 4
    assert all(torch.equal(one, two) for one, two in zip(average.means, other.means, strict=True))
    other.load_state_dict(ParameterAverage(model).state_dict())
    assert other.count == 0 and other.means == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="patience: expected at least 1, got 0"):
        NonMonotonicTrigger(0)
    with pytest.raises(TypeError, match=r"patience: expected an int, got 2\.0"):
        NonMonotonicTrigger(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule: expected 'released' or 'paper', got 'best'"):
        NonMonotonicTrigger(rule="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected a number, got NaN"):
        NonMonotonicTrigger().step(float("nan"))
    with pytest.raises(TypeError, match=r"loss: expected a number, got shape \(2,\)"):
        NonMonotonicTrigger().step(torch.zeros(2))
    with pytest.raises(TypeError, match=r"loss: expected a number, got '5\.0' of type str"):
        NonMonotonicTrigger().step("5.0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters: expected at least one, got none"):
        ParameterAverage([])
    with pytest.raises(TypeError, match="parameters: expected a module or parameters"):
        ParameterAverage(nn.LSTM(3, 4).named_parameters())  # type: ignore[arg-type]
    average = ParameterAverage(nn.LSTM(3, 4))
    with pytest.raises(RuntimeError, match=r"expected an update\(\) before applied\(\)"), average.applied():
        pass
    average.update()
    with pytest.raises(ValueError, match=r"state: expected means of shapes .*\(16, 3\).*got .*\(20, 3\)"):
        average.load_state_dict(averaged_state(nn.LSTM(3, 5)))


def averaged_state(module: nn.Module) -> dict[str, Any]:
    average = ParameterAverage(module)
    average.update()
    return average.state_dict()
