"""``replace_lstms``: what goes along, what is left, and what is refused with nothing changed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedreg


class Tagger(nn.Module):
    """A small program of somebody else's: an embedding, two LSTMs, one of them under two names."""

    encoder: Any
    alias: Any

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.blocks = nn.ModuleList([nn.LSTM(10, 3, bias=False), nn.Linear(3, 2)])
        self.alias = self.encoder

    def forward(self, tokens: Tensor) -> Tensor:
        encoded, _ = self.encoder(self.embedding(tokens))
        hidden, _ = self.blocks[0](encoded)
        result: Tensor = self.blocks[1](hidden)
        return result


TOKENS = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(2))


def test_a_program_computes_the_same_afterwards() -> None:
    model = Tagger().eval()
    expected = model(TOKENS)
    names, parameters = list(model.state_dict()), list(model.parameters())
    generator = torch.get_rng_state()
    report = fusedreg.replace_lstms(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(report.replaced) == ["encoder", "blocks.0"]
    assert report.names == {"encoder": ("encoder", "alias"), "blocks.0": ("blocks.0",)}
    assert model.encoder is model.alias is report.replaced["encoder"]
    assert isinstance(model.blocks[0], fusedreg.LSTM)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not model.encoder.training
    torch.testing.assert_close(model(TOKENS), expected)
    assert str(report).splitlines() == [
        "replaced 2 nn.LSTM, left 0",
        f"  encoder, alias: {model.encoder}",
        f"  blocks.0: {model.blocks[0]}",
    ]


def test_an_optimiser_made_before_goes_on() -> None:
    torch.manual_seed(0)
    model, other = Tagger(), Tagger()
    other.load_state_dict(model.state_dict())
    losses = []
    for one, replaces in ((model, True), (other, False)):
        one.encoder.dropout = 0.0
        optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
        if replaces:
            fusedreg.replace_lstms(one)
        for _ in range(3):
            optimiser.zero_grad()
            loss = one(TOKENS).square().mean()
            loss.backward()
            optimiser.step()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])
    for value, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected)


def test_options_for_all_for_each_and_skip() -> None:
    report = fusedreg.replace_lstms(model := Tagger(), {"zoneout_cell": 0.2}, skip=["blocks.0"])
    assert model.encoder.regularization.zoneout_cell == 0.2
    assert model.encoder.dropout == 0.1
    assert report.left == {"blocks.0": "as asked for by skip"}
    assert type(model.blocks[0]) is nn.LSTM
    report = fusedreg.replace_lstms(
        model := Tagger(), lambda name, module: {"recompute": True} if module.bidirectional else None
    )
    assert model.encoder.recompute
    assert list(report.left) == ["blocks.0"]
    with_norm = nn.Sequential(nn.LSTM(3, 4))
    normed: Any = fusedreg.replace_lstms(with_norm, {"norm": fusedreg.BatchNorm(max_steps=5)}).replaced["0"]
    assert normed.norm_cell_weight_l0.eq(0.1).all()
    assert normed.running_cell_var_l0.eq(1).all()


@pytest.mark.parametrize("skip", ["encoder", "alias"])
def test_a_module_under_several_names_is_left_under_all_of_them(skip: str) -> None:
    model = Tagger()
    before = model.encoder
    report = fusedreg.replace_lstms(model, skip=skip)
    assert model.encoder is model.alias is before
    assert report.left == {"encoder": "as asked for by skip"}
    assert "  encoder, alias: left, as asked for by skip" in str(report)
    asked: list[str] = []
    fusedreg.replace_lstms(model, lambda name, module: asked.append(name))  # which gives None: leave it
    assert asked == ["encoder"]


class Stepper(nn.Module):
    """Two cells, one of them inside a block that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(3, 4)
        self.block: Any = nn.Sequential(nn.LSTMCell(4, 4, bias=False))
        self.again = self.block

    def forward(self, input: Tensor) -> Tensor:
        state, last = None, None
        for step in input:
            state = self.first(step, state)
            last = self.again[0](state[0], self.block[0](state[0], last))
        result: Tensor = last[1]
        return result


def test_cells_are_replaced_too() -> None:
    model: Any = Stepper().eval()
    input = torch.randn(4, 2, 3)
    seen: list[str] = []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    parametrizations.spectral_norm(model.block[0], "weight_hh")
    expected, names, parameters = model(input), list(model.state_dict()), list(model.parameters())
    shared = model.block[0].weight_ih
    report = fusedreg.replace_lstms(model)
    assert str(report).splitlines()[0] == "replaced 2 nn.LSTMCell, left 0"
    assert report.names == {"first": ("first",), "block.0": ("block.0", "again.0")}
    assert isinstance(model.first, fusedreg.LSTMCell)
    assert isinstance(model.block[0], fusedreg.LSTMCell)
    assert model.block[0] is model.again[0]
    assert model.block[0].weight_ih is shared
    assert not model.first.training
    assert list(model.state_dict()) == names
    assert {id(value) for value in model.parameters()} == {id(value) for value in parameters}
    seen.clear()
    torch.testing.assert_close(model(input), expected)
    assert seen == ["LSTMCell"] * 4
    both = nn.ModuleList([nn.LSTM(3, 4), nn.LSTMCell(3, 4)])
    report = fusedreg.replace_lstms(both, {"zoneout_cell": 0.2})
    assert str(report).startswith("replaced 1 nn.LSTM and 1 nn.LSTMCell, left 0\n")
    assert [module.regularization.zoneout_cell for module in both] == [0.2, 0.2]  # type: ignore[union-attr]


def test_hooks_go_along_and_their_handles_still_remove_them() -> None:
    model: Any = nn.Sequential(nn.LSTM(3, 4))
    seen: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda module, inputs, output: seen.append("after")),
        model[0].register_forward_pre_hook(lambda module, inputs: seen.append("before")),
        model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
        model[0].register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append("state")),
    ]
    fusedreg.replace_lstms(model)
    model(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    model.state_dict()
    assert seen == ["before", "after", "backward", "state"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(2, 1, 3))
    assert seen == []


def test_attributes_of_the_program_go_along() -> None:
    model: Any = nn.Sequential(nn.LSTM(3, 4))
    model[0].owner = ["a program"]
    model[0].flatten_parameters = lambda: "nothing to do"
    owner = model[0].owner
    fusedreg.replace_lstms(model)
    assert model[0].owner is owner
    assert model[0].flatten_parameters() == "nothing to do"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrisations_go_along(name: str, training: bool) -> None:
    """With their originals, as the same parameters, and with what they keep: a power iteration goes on from there."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.LSTM(3, 4))
    getattr(parametrizations, name)(model[0], "weight_hh_l0")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = {id(parameter) for parameter in model.parameters()}
    fusedreg.replace_lstms(model.train(training))
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(part.training == training for part in model.modules())


def test_a_parametrised_weight_computes_the_same() -> None:
    model: Any = nn.Sequential(nn.LSTM(3, 4))
    parametrizations.spectral_norm(model[0], "weight_hh_l0")
    model.eval()
    input = torch.randn(5, 2, 3)
    expected, names = model(input)[0], set(model.state_dict())
    fusedreg.replace_lstms(model)
    assert parametrize.is_parametrized(model[0], "weight_hh_l0")
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(input)[0], expected)


class Derived(nn.LSTM):
    pass


class DerivedCell(nn.LSTMCell):
    pass


def weight_normed() -> Any:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")


def with_more(module: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    change(module)
    return module


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        result: nn.Module = torch.jit.script(module)
    return result


REFUSED: dict[str, Any] = {
    "it is scripted": lambda: scripted(nn.LSTM(3, 4)),
    "it is scripted: replace it in the model": lambda: scripted(nn.LSTMCell(3, 4)),
    "is derived from nn.LSTM": lambda: Derived(3, 4),
    "weight_hh_l0_g.*remove_weight_norm": weight_normed,
    "weight_hh_l0_orig.*prune.remove": lambda: prune.identity(nn.LSTM(3, 4), "weight_hh_l0"),
    "dropout": lambda: nn.LSTM(3, 4, 2, dropout=1.0),
    "is derived from nn.LSTMCell": lambda: DerivedCell(3, 4),
    "nn.LSTMCell's own.*weight_hh_orig.*prune.remove": lambda: prune.identity(nn.LSTMCell(3, 4), "weight_hh"),
    "buffers or modules that nn.LSTM has not .own.": lambda: with_more(
        nn.LSTM(3, 4), lambda module: module.register_buffer("own", torch.zeros(1))
    ),
    "buffers or modules that nn.LSTMCell has not .head.": lambda: with_more(
        nn.LSTMCell(3, 4), lambda module: module.add_module("head", nn.Linear(4, 1))
    ),
    "its forward is not nn.LSTM's own": lambda: with_more(
        nn.LSTM(3, 4), lambda module: setattr(module, "forward", functools.partial(module.forward))
    ),
    "its _compiled_call_impl is not nn.LSTM's own.*compile": lambda: with_more(
        nn.LSTM(3, 4), lambda module: module.compile()
    ),
    "its attribute recompute means something else": lambda: with_more(
        nn.LSTM(3, 4), lambda module: setattr(module, "recompute", "weekly")
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_replaced_is_named_and_nothing_is_changed(message: str) -> None:
    model = nn.Sequential(nn.LSTM(3, 4), REFUSED[message]())
    before = list(model)
    with pytest.raises(ValueError, match=rf"(?s)nothing was replaced.*skip.*\n  1: .*{message}"):
        fusedreg.replace_lstms(model)
    assert all(one is other for one, other in zip(model, before, strict=True))
    assert list(fusedreg.replace_lstms(model, skip="1").replaced) == ["0"]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fusedreg.replace_lstms(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an nn\.LSTM itself.*from_torch"):
        fusedreg.replace_lstms(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"an nn\.LSTMCell itself.*fusedreg\.LSTMCell\.from_torch"):
        fusedreg.replace_lstms(nn.LSTMCell(3, 4))
    between_layers = {"regularization": fusedreg.Regularization(dropout=0.5)}
    with pytest.raises(ValueError, match=r"1: dropout: expected 0 for a cell"):
        fusedreg.replace_lstms(nn.Sequential(nn.LSTM(3, 4, 2), nn.LSTMCell(3, 4)), between_layers)
    for own_output in ({"output_dropout": 0.5}, {"zoneout_hidden": 0.5, "zoneout_output": "candidate"}):
        with pytest.raises(ValueError, match=r"1: return_output: expected True with (output_dropout|zoneout_output)"):
            fusedreg.replace_lstms(nn.Sequential(nn.LSTM(3, 4), nn.LSTMCell(3, 4)), own_output)
    with pytest.raises(
        ValueError, match=r"skip: expected names of nn\.LSTM or nn\.LSTMCell modules, got \['x'\]; there are \['0'\]"
    ):
        fusedreg.replace_lstms(nn.Sequential(nn.LSTM(3, 4)), skip=["x"])
    with pytest.raises(ValueError, match=r"1: .*zoneout_cell"):
        fusedreg.replace_lstms(nn.Sequential(nn.Identity(), nn.LSTM(3, 4)), {"zoneout_cell": 2.0})
    for options in (3, ["zoneout_cell"], lambda name, module: 3):
        with pytest.raises(TypeError, match=r"options: expected keyword arguments.* got (int|list)"):
            fusedreg.replace_lstms(nn.Sequential(nn.LSTM(3, 4)), options)  # type: ignore[arg-type]
    assert fusedreg.replace_lstms(nn.Linear(1, 1)).replaced == {}
