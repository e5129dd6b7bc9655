"""``fusedreg.LSTM`` in the place of ``nn.LSTM``: parameters, state, copies, conversion, and what programs read."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"bidirectional": True, "proj_size": 3},
    {"num_layers": 2, "proj_size": 2, "bias": False},
    {"num_layers": 2, "dropout": 0.5, "dtype": torch.float64},
]
NORMS = [
    None,
    LayerNorm(),
    BatchNorm(max_steps=5),
    BatchNorm(statistics="shared", input_statistics="sequence", recurrent=False),
]
INPUT = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


def ids(value: Any) -> str:
    return (
        ",".join(f"{key}={item}" for key, item in value.items()) or "plain" if isinstance(value, dict) else repr(value)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_parameters_are_nn_lstms(options: dict[str, Any], norm: Any) -> None:
    """Names, order, shapes and, under one seed, values; a norm's come after, and draw nothing."""
    torch.manual_seed(4)
    theirs, after = nn.LSTM(4, 5, **options), torch.rand(())
    torch.manual_seed(4)
    ours, after_ours = fusedreg.LSTM(4, 5, **options, norm=norm), torch.rand(())
    expected = dict(theirs.named_parameters())
    got = dict(ours.named_parameters())
    assert list(got)[: len(expected)] == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(got[name], parameter)
        assert got[name].dtype == parameter.dtype
    assert all(name.startswith("norm_") for name in list(got)[len(expected) :])
    assert after == after_ours


def test_names_of_a_norm() -> None:
    """Those of semantics: gains without shifts where the bias is the shift, buffers by step."""
    module = fusedreg.LSTM(4, 5, bidirectional=True, norm=BatchNorm(max_steps=7, input_statistics="sequence"))
    added = [name for name, _ in module.named_parameters() if name.startswith("norm_")]
    for end in ("_l0", "_l0_reverse"):
        fields = ["norm_input_weight", "norm_recurrent_weight", "norm_cell_weight", "norm_cell_bias"]
        assert [name for name in added if name.endswith(end)] == [field + end for field in fields]
        shapes = {name: tuple(buffer.shape) for name, buffer in module.named_buffers() if name.endswith(end)}
        assert shapes == {
            f"running_input_mean{end}": (1, 20),
            f"running_input_var{end}": (1, 20),
            f"running_recurrent_mean{end}": (7, 20),
            f"running_recurrent_var{end}": (7, 20),
            f"running_cell_mean{end}": (7, 5),
            f"running_cell_var{end}": (7, 5),
            f"num_batches_tracked{end}": (7,),
        }
    assert module.norm_input_weight_l0.unique().item() == pytest.approx(0.1)
    assert not module.norm_cell_bias_l0.any()
    layer = fusedreg.LSTM(4, 5, norm=LayerNorm(cell=False))
    added = [name for name, _ in layer.named_parameters() if name.startswith("norm_")]
    assert added == [f"norm_{site}_{kind}_l0" for site in ("input", "recurrent") for kind in ("weight", "bias")]
    assert layer.norm_input_weight_l0.unique().item() == 1
    assert not list(layer.buffers())


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_signature_is_nn_lstms(options: dict[str, Any]) -> None:
    """Positions first, then the names of nn.LSTM, then keywords only: every field of Regularization among them."""
    theirs = list(inspect.signature(nn.RNNBase.__init__).parameters)[2:]
    ours = inspect.signature(fusedreg.LSTM).parameters
    assert list(ours)[: len(theirs)] == theirs
    for name in list(ours)[len(theirs) :]:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY
    fields = {field.name: field.default for field in dataclasses.fields(Regularization)}
    assert {name: ours[name].default for name in fields} == fields
    module, original = fusedreg.LSTM(4, 5, **options), nn.LSTM(4, 5, **options)
    for name in (*nn.LSTM.__constants__, "training"):
        assert getattr(module, name) == getattr(original, name), name
        assert type(getattr(module, name)) is type(getattr(original, name)), name
    assert module._flat_weights_names == original._flat_weights_names
    assert [[tuple(weight.shape) for weight in group] for group in module.all_weights] == [
        [tuple(weight.shape) for weight in group] for group in original.all_weights
    ]
    assert module.flatten_parameters() is None
    assert not isinstance(module, nn.LSTM)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.filterwarnings("ignore:fusedreg runs this LSTM with its reference")
def test_state_dicts_load_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = nn.LSTM(4, 5, **options), fusedreg.LSTM(4, 5, **options)
    input = INPUT.to(options.get("dtype", torch.float32))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(input)[0], theirs.eval()(input)[0])
    fresh = nn.LSTM(4, 5, **options).eval()
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(input)[0], theirs(input)[0])


def regularised(**options: Any) -> fusedreg.LSTM:
    torch.manual_seed(2)
    return fusedreg.LSTM(4, 5, 2, zoneout_cell=0.3, weight_dropout=0.2, norm=BatchNorm(max_steps=5), **options)


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies(duplicate: Any) -> None:
    """Equal, independent, and as ready for a call."""
    module = regularised(recompute=True)
    module(INPUT)
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert torch.equal(other(INPUT, seed=3)[0], module(INPUT, seed=3)[0])
    with torch.no_grad():
        for value in [*other.parameters(), *other.buffers()]:
            value.add_(1)
    for name, value in module.state_dict().items():
        assert not torch.equal(value, other.state_dict()[name])
    assert torch.equal(other.eval()(INPUT)[0], other(INPUT)[0])


def test_weights_can_be_dropped_by_hand() -> None:
    """The old wrapped-parameter trick: a plain tensor under the parameter's name is what is used and differentiated."""
    module = fusedreg.LSTM(4, 5)
    raw = nn.Parameter(module.weight_hh_l0.detach().clone())
    del module.weight_hh_l0
    module.weight_hh_l0 = raw * 2
    expected = fusedreg.LSTM(4, 5)
    expected.load_state_dict({**module.state_dict(), "weight_hh_l0": (raw * 2).detach()})
    output = module(INPUT)[0]
    assert torch.equal(output, expected(INPUT)[0])
    assert torch.autograd.grad(output.sum(), raw)[0].any()


def test_parametrize_and_prune() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module = fusedreg.LSTM(4, 5)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight_hh_l0.div_(2)
    parametrize.register_parametrization(module, "weight_hh_l0", Half())
    assert torch.equal(module(INPUT)[0], plain(INPUT)[0])
    module(INPUT)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original.grad.any()
    assert torch.equal(copy.deepcopy(module)(INPUT)[0], plain(INPUT)[0])
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert torch.equal(module(INPUT)[0], plain(INPUT)[0])
    prune.l1_unstructured(module, "weight_ih_l0", amount=0.5)
    pruned = module(INPUT)[0]
    prune.remove(module, "weight_ih_l0")
    assert torch.equal(module(INPUT)[0], pruned)
    assert module.weight_ih_l0.eq(0).float().mean() == 0.5


def test_functional_call_swaps_parameters_and_buffers() -> None:
    """Running statistics are those that were passed, and those are the ones that are updated."""
    module = regularised()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value.detach().clone() for name, value in regularised().state_dict().items()}
    state["weight_hh_l0"] *= 0.5
    expected = copy.deepcopy(module)
    expected.load_state_dict(state)
    output = torch.func.functional_call(module, state, (INPUT,), {"seed": 4})[0]
    assert torch.equal(output, expected(INPUT, seed=4)[0])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
        if name.startswith(("running", "num_batches")):
            assert torch.equal(state[name], expected.state_dict()[name])


def test_ensembles() -> None:
    """vmap over stacked parameters, each model with masks of its own seed."""
    models = [fusedreg.LSTM(4, 5, zoneout_cell=0.4) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0])

    def call(weights: dict[str, Tensor], seed: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(base, weights, (INPUT,), {"seed": seed})[0]
        return output

    seeds = torch.arange(3)
    outputs = torch.vmap(call)(parameters, seeds)
    for model, seed, output in zip(models, seeds, outputs, strict=True):
        torch.testing.assert_close(output, model(INPUT, seed=seed)[0])


def test_running_statistics_are_updated_once_and_only_by_a_call_that_succeeded() -> None:
    module = regularised()
    before = {name: value.clone() for name, value in module.named_buffers()}
    with pytest.raises(ValueError, match="lengths"):
        module(INPUT, lengths=[9, 1, 1])
    with pytest.raises(TypeError, match="seed"):
        module(INPUT, seed=0.5)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    module(INPUT)
    assert module.num_batches_tracked_l0.tolist() == [1] * 5
    assert not torch.equal(module.running_cell_mean_l1, before["running_cell_mean_l1"])
    module.eval()(INPUT)
    assert module.num_batches_tracked_l0.tolist() == [1] * 5
    module.train()(INPUT, lengths=torch.tensor([5, 3, 1]))
    assert module.num_batches_tracked_l1.tolist() == [2, 2, 2, 1, 1]
    module.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
def test_backward_after_the_statistics_were_updated(backend: str) -> None:
    """A backward that comes after further calls gives what it would have given at once."""
    module = regularised(backend=backend)
    lengths = torch.tensor([5, 3, 1])

    def gradient(again: bool) -> Tensor:
        used = copy.deepcopy(module)
        loss = used(INPUT, lengths=lengths, seed=3)[0].pow(2).sum()
        if again:
            used(INPUT, lengths=lengths, seed=4)
        return torch.autograd.grad(loss, used.weight_ih_l0)[0]

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_regularisers_can_be_given_either_way() -> None:
    rates = {"zoneout_cell": 0.5, "hidden_dropout": [0.1, 0.2], "gate_masks": "untied"}
    first = fusedreg.LSTM(4, 5, 2, dropout=0.3, **rates)
    second = fusedreg.LSTM(4, 5, 2, True, False, 0.3, regularization=Regularization(**rates))  # type: ignore[arg-type]
    third = fusedreg.LSTM(4, 5, 2, regularization=Regularization(dropout=0.3, **rates))  # type: ignore[arg-type]
    assert first.regularization == second.regularization == third.regularization
    with pytest.raises(ValueError, match="regularization: expected None beside hidden_dropout, zoneout_cell"):
        fusedreg.LSTM(4, 5, regularization=Regularization(), zoneout_cell=0.5, hidden_dropout=0.1)
    with pytest.raises(ValueError, match="regularization: expected None beside dropout"):
        fusedreg.LSTM(4, 5, 2, dropout=0.1, regularization=Regularization(dropout=0.2))


def test_rates_can_be_changed_between_calls() -> None:
    """As programs do with nn.LSTM's dropout; the norm stays, for its parameters are there."""
    module = fusedreg.LSTM(4, 5, 2)
    torch.manual_seed(0)
    plain = module(INPUT, seed=1)[0]
    module.dropout = 0.5
    assert module.dropout == 0.5
    assert not torch.equal(module(INPUT, seed=1)[0], plain)
    module.regularization = Regularization()
    assert torch.equal(module(INPUT, seed=1)[0], plain)
    with pytest.raises(ValueError, match=r"norm=None.*make a new LSTM"):
        module.regularization = Regularization(norm=LayerNorm())
    with pytest.raises(ValueError, match="zoneout_cell"):
        module.regularization = Regularization(zoneout_cell=[0.1, 0.2, 0.3])
    with pytest.raises(TypeError, match="regularization"):
        module.regularization = 0.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="dropout"):
        module.dropout = 1.5
    assert torch.equal(module(INPUT, seed=1)[0], plain)


def test_extra_repr() -> None:
    module = fusedreg.LSTM(4, 5, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3)
    theirs = nn.LSTM(4, 5, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3)
    assert repr(module) == repr(theirs)
    module = fusedreg.LSTM(4, 5, zoneout_cell=0.5, norm=LayerNorm(cell=False), recompute=True, backend="reference")
    norm = "LayerNorm(input=True, recurrent=True, cell=False, eps=1e-05)"
    assert repr(module) == f"LSTM(4, 5, zoneout_cell=0.5, norm={norm}, recompute=True, backend='reference')"


def test_dropout_of_one_layer_warns_as_nn_lstm_does() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout") as ours:
        fusedreg.LSTM(4, 5, dropout=0.3)
    with pytest.warns(UserWarning, match="dropout option adds dropout") as theirs:
        nn.LSTM(4, 5, dropout=0.3)
    assert str(ours[0].message) == str(theirs[0].message)
    assert ours[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedreg.LSTM(4, 5, dropout=[])
        fusedreg.LSTM(4, 5, 2, dropout=0.3)


CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((4, 0), {}),
    ((0, 4), {}),
    ((4, 5.0), {}),
    (("4", 5), {}),
    ((4, 5, 0), {}),
    ((4, 5), {"bias": 1}),
    ((4, 5), {"batch_first": "yes"}),
    ((4, 5), {"proj_size": 5}),
    ((4, 5), {"proj_size": -1}),
    ((4, 5), {"dropout": -0.1}),
    ((4, 5), {"dropout": 1.1}),
    ((4, 5), {"dropout": True}),
    ((4, 5), {"dropout": "a"}),
    ((4, 5), {"dtype": torch.int64}),
]


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize(("positional", "named"), CONSTRUCTIONS, ids=str)
def test_construction_raises_what_nn_lstm_raises(positional: Any, named: Any) -> None:
    theirs: type[Exception] | tuple[type[Exception], ...] = (TypeError, ValueError)
    try:
        nn.LSTM(*positional, **named)  # torch 2.10 takes some that later ones refuse
    except Exception as error:
        theirs = type(error)
    with pytest.raises(theirs) as ours:
        fusedreg.LSTM(*positional, **named)
    assert ": expected " in str(ours.value)


CALLS: list[tuple[Any, ...]] = [
    (torch.ones(4),),
    (torch.ones(5, 3, 6),),
    (torch.ones(5, 3, 4).double(),),
    (torch.ones(0, 3, 4),),
    (torch.ones(5, 3, 4), (torch.ones(1, 2, 5), torch.ones(1, 3, 5))),
    (torch.ones(5, 3, 4), (torch.ones(1, 3, 5), torch.ones(1, 3, 4))),
    (torch.ones(5, 3, 4), (torch.ones(3, 5), torch.ones(3, 5))),
    (torch.ones(5, 4), (torch.ones(1, 1, 5), torch.ones(1, 1, 5))),
    (torch.ones(5, 3, 4), torch.ones(2, 3, 5)),
    (torch.ones(5, 3, 4, device="meta"),),
]


@pytest.mark.parametrize("arguments", CALLS, ids=range(len(CALLS)))
def test_a_call_raises_what_nn_lstm_raises(arguments: Any) -> None:
    with pytest.raises(Exception) as theirs:
        nn.LSTM(4, 5)(*arguments)
    with pytest.raises(type(theirs.value)) as ours:
        fusedreg.LSTM(4, 5)(*arguments)
    assert ": expected " in str(ours.value)


def test_script_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script.*torch\.compile.*to_torch"):
        torch.jit.script(fusedreg.LSTM(4, 5))
    with pytest.raises(RuntimeError, match="to_torch"):
        torch.jit.script(nn.Sequential(fusedreg.LSTM(4, 5)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantisation_is_refused_with_the_remedy() -> None:
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    model = nn.Sequential(fusedreg.LSTM(4, 5))
    with pytest.raises(NotImplementedError, match=r"quantization.*qconfig to None.*to_torch"):
        quantize_dynamic(model, {fusedreg.LSTM: default_dynamic_qconfig})
    quantize_dynamic(nn.Sequential(fusedreg.LSTM(4, 5)), {nn.Linear})  # leaves it out


def test_to_meta_and_back() -> None:
    """Skipped initialisation, as large models do it."""
    module = nn.utils.skip_init(fusedreg.LSTM, 4, 5, norm=BatchNorm(max_steps=3))
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}
    with torch.device("meta"):
        module = fusedreg.LSTM(4, 5)
    output, _ = module(torch.ones(5, 3, 4, device="meta"))
    assert (output.shape, output.device.type) == ((5, 3, 5), "meta")
    module.to_empty(device="cpu").reset_parameters()
    assert module(INPUT)[0].isfinite().all()


def test_bfloat16_and_back() -> None:
    module = regularised().to(torch.bfloat16)
    assert module(INPUT.bfloat16()).output.dtype == torch.bfloat16
    assert module.running_cell_mean_l0.dtype == torch.bfloat16
    assert module.num_batches_tracked_l0.dtype == torch.int64
    assert module.float()(INPUT).output.dtype == torch.float32


def test_docstring_mentions_every_argument() -> None:
    text = (fusedreg.LSTM.__doc__ or "") + (fusedreg.LSTM.forward.__doc__ or "")
    of_regularization = {field.name for field in dataclasses.fields(Regularization)}  # described there
    for function in (fusedreg.LSTM.__init__, fusedreg.LSTM.forward):
        for name in [*inspect.signature(function).parameters][1:]:
            assert name in of_regularization or re.search(rf"\b{name}\b", text), name


def test_batch_first_can_be_assigned_later() -> None:
    module, theirs = fusedreg.LSTM(3, 4), nn.LSTM(3, 4)
    for lstm in (module, theirs):
        lstm.batch_first = True
    input = torch.randn(2, 5, 3)
    assert module(input).output.shape == theirs(input)[0].shape == (2, 5, 4)
    assert module(input)[1][0].shape == theirs(input)[1][0].shape == (1, 2, 4)
    module.batch_first = 1  # type: ignore[assignment]
    with pytest.raises(TypeError, match="batch_first"):
        module(input)
