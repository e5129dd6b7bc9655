"""Bad inputs that were tried: what each raises, the words its message needs, and that nothing was changed by it.

A message names the argument, says what was expected and what came, and how to mend it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization
from fusedreg.functional import lstm

NAN, INFINITY = float("nan"), float("inf")


class Bad(NamedTuple):
    """A call, the error it must raise, and what its message must say."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def options(error: type[Exception], *words: str, **keywords: Any) -> Bad:
    text = ",".join(f"{name}={value}" for name, value in keywords.items())
    return Bad(text, lambda: Regularization(**keywords), error, words)


def batch_norm(error: type[Exception], *words: str, **keywords: Any) -> Bad:
    text = ",".join(f"{name}={value}" for name, value in keywords.items())
    return Bad(f"BatchNorm({text})", lambda: BatchNorm(**keywords), error, words)


OPTIONS = [
    *(
        options(ValueError, name, "[0, 1)", "1.0", **{name: 1.0})
        for name in (
            "dropout",
            "input_dropout",
            "hidden_dropout",
            "output_dropout",
            "update_dropout",
            "cell_dropout",
            "weight_dropout",
            "zoneout_hidden",
            "zoneout_cell",
        )
    ),
    options(ValueError, "zoneout_cell", "[0, 1)", "-0.1", zoneout_cell=-0.1),
    options(ValueError, "zoneout_cell", "[0, 1)", "nan", zoneout_cell=NAN),
    options(ValueError, "hidden_dropout", "[0, 1)", "inf", hidden_dropout=INFINITY),
    options(TypeError, "hidden_dropout", "number", "'0.5'", hidden_dropout="0.5"),
    options(TypeError, "hidden_dropout", "number", "None", hidden_dropout=None),
    options(TypeError, "dropout", "number", "True", dropout=True),
    options(TypeError, "dropout", "number", "1j", dropout=1j),
    options(ValueError, "hidden_dropout", "empty", hidden_dropout=[]),
    options(ValueError, "hidden_dropout[1]", "[0, 1)", "1.5", hidden_dropout=[0.1, 1.5]),
    options(TypeError, "hidden_dropout[0]", "number", hidden_dropout=["a"]),
    options(ValueError, "gate_masks", "'tied' or 'untied'", "'both'", gate_masks="both"),
    options(ValueError, "update_mask", "'step' or 'sequence'", "None", update_mask=None),
    options(ValueError, "weight_mask", "'element' or 'row'", "'column'", weight_mask="column"),
    options(ValueError, "zoneout_output", "'state' or 'candidate'", "1", zoneout_output=1),
    options(TypeError, "norm", "BatchNorm", "LayerNorm", "'batch'", norm="batch"),
    options(TypeError, "norm", "BatchNorm", norm=BatchNorm),
    options(TypeError, "norm", "BatchNorm", norm=torch.nn.LayerNorm(4)),
    batch_norm(ValueError, "max_steps", "per_step", "None", "shared"),
    batch_norm(ValueError, "max_steps", "positive", "0", max_steps=0),
    batch_norm(TypeError, "max_steps", "int", "10.0", max_steps=10.0),
    batch_norm(TypeError, "max_steps", "int", "True", max_steps=True),
    batch_norm(ValueError, "max_steps", "shared", max_steps=5, statistics="shared"),
    batch_norm(ValueError, "statistics", "'per_step' or 'shared'", "'step'", max_steps=5, statistics="step"),
    batch_norm(ValueError, "input_statistics", "'step' or 'sequence'", max_steps=5, input_statistics="batch"),
    batch_norm(ValueError, "momentum", "[0, 1]", "1.5", max_steps=5, momentum=1.5),
    batch_norm(ValueError, "momentum", "nan", max_steps=5, momentum=NAN),
    batch_norm(TypeError, "momentum", "'none'", max_steps=5, momentum="none"),
    batch_norm(ValueError, "eps", "positive", "0.0", max_steps=5, eps=0.0),
    batch_norm(ValueError, "eps", "positive", "nan", max_steps=5, eps=NAN),
    batch_norm(ValueError, "weight_init", "finite", "inf", max_steps=5, weight_init=INFINITY),
    batch_norm(TypeError, "input", "True or False", "1", max_steps=5, input=1),
    batch_norm(ValueError, "input", "recurrent", "cell", max_steps=5, input=False, recurrent=False, cell=False),
    Bad("LayerNorm(eps=-1)", lambda: LayerNorm(eps=-1.0), ValueError, ("eps", "positive", "-1.0")),
    Bad("LayerNorm(cell=None)", lambda: LayerNorm(cell=None), TypeError, ("cell", "None")),  # type: ignore[arg-type]
    Bad("LayerNorm(nothing)", lambda: LayerNorm(False, False, False), ValueError, ("input", "recurrent", "cell")),
]


def made(error: type[Exception], *words: str, sizes: tuple[Any, ...] = (4, 5), **keywords: Any) -> Bad:
    text = ",".join(f"{name}={value}" for name, value in keywords.items())
    return Bad(f"LSTM({sizes} {text})", lambda: fusedreg.LSTM(*sizes, **keywords), error, words)


MODULES = [
    made(ValueError, "hidden_size", "positive", "0", sizes=(4, 0)),
    made(ValueError, "input_size", "-1", sizes=(-1, 4)),
    made(TypeError, "hidden_size", "int", "5.0", sizes=(4, 5.0)),
    made(ValueError, "num_layers", "0", sizes=(4, 5, 0)),
    made(TypeError, "num_layers", "True", num_layers=True),
    made(TypeError, "bias", "True or False", "'no'", bias="no"),
    made(TypeError, "batch_first", "1", batch_first=1),
    made(TypeError, "recompute", "None", recompute=None),
    made(ValueError, "proj_size", "hidden_size=5", "5", proj_size=5),
    made(ValueError, "proj_size", "-2", proj_size=-2),
    made(ValueError, "backend", "'cuda_graphs'", "'reference'", "'cpu'", backend="cuda_graphs"),
    made(TypeError, "backend", "int", backend=3),
    made(ValueError, "dropout", "[0, 1)", "1.0", dropout=1.0),
    made(ValueError, "zoneout_cell", "num_layers=2", "3", num_layers=2, zoneout_cell=[0.1, 0.2, 0.3]),
    made(ValueError, "dropout", "num_layers=4", num_layers=4, dropout=[0.1, 0.2]),
    made(TypeError, "zoneout", zoneout=0.1),
    made(ValueError, "zoneout_cell", regularization=Regularization(zoneout_cell=0.1), zoneout_cell=0.2),
    made(TypeError, "regularization", "dict", regularization={"zoneout_cell": 0.1}),
    made(TypeError, "dtype", dtype=torch.int64),
]

INPUT = torch.ones(6, 3, 4)
PLAIN = fusedreg.LSTM(4, 5)
ZONED = fusedreg.LSTM(4, 5, zoneout_cell=0.3)
BOTH = fusedreg.LSTM(4, 5, bidirectional=True)
NORMED = fusedreg.LSTM(4, 5, norm=BatchNorm(max_steps=6))
FIRST = fusedreg.LSTM(4, 5, batch_first=True)
NARROW = fusedreg.LSTM(4, 5, dtype=torch.bfloat16)
CALLED = [PLAIN, ZONED, BOTH, NORMED, FIRST, NARROW]


def bad_call(
    name: str,
    error: type[Exception],
    *words: str,
    module: fusedreg.LSTM = PLAIN,
    input: Any = INPUT,
    hx: Any = None,
    **keywords: Any,
) -> Bad:
    return Bad(name, lambda: module(input, hx, **keywords), error, words)


def states(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


CALLS = [
    # The input.
    bad_call("a list", TypeError, "input", "tensor", "list", input=[[1.0]]),
    bad_call("None", TypeError, "input", "tensor", "NoneType", input=None),
    bad_call("rank 1", ValueError, "input", "(4,)", input=torch.ones(4)),
    bad_call("rank 4", ValueError, "input", "(1, 6, 3, 4)", input=torch.ones(1, 6, 3, 4)),
    bad_call("features", ValueError, "input", "input_size=4", "(6, 3, 7)", input=torch.ones(6, 3, 7)),
    bad_call("no features", ValueError, "input", "input_size=4", "(6, 3, 0)", input=torch.ones(6, 3, 0)),
    bad_call("float64", ValueError, "input", "torch.float32", "torch.float64", input=INPUT.double()),
    bad_call("integers", ValueError, "input", "torch.float32", "torch.int64", input=INPUT.long()),
    bad_call("float32 beside bfloat16", ValueError, "input", "torch.bfloat16", "torch.float32", module=NARROW),
    bad_call("another device", ValueError, "input", "cpu", "meta", input=torch.ones(6, 3, 4, device="meta")),
    bad_call("no steps", ValueError, "input", "time step", "(0, 3, 4)", input=torch.ones(0, 3, 4)),
    bad_call("no steps, unbatched", ValueError, "input", "time step", "(0, 4)", input=torch.ones(0, 4)),
    bad_call(
        "no steps, batch first", ValueError, "input", "time step", "(3, 0, 4)", module=FIRST, input=torch.ones(3, 0, 4)
    ),
    bad_call("packed features", ValueError, "input", "input_size=4", input=pack_sequence([torch.ones(2, 7)])),
    bad_call(
        "packed float64",
        ValueError,
        "input",
        "torch.float32",
        "torch.float64",
        input=pack_sequence([torch.ones(2, 4).double()]),
    ),
    bad_call(
        "one row of a batch norm",
        ValueError,
        "BatchNorm",
        "batch of 1",
        "eval",
        module=NORMED,
        input=torch.ones(6, 1, 4),
    ),
    bad_call(
        "unbatched with a batch norm", ValueError, "BatchNorm", "batch of 1", module=NORMED, input=torch.ones(6, 4)
    ),
    # The state.
    bad_call("one tensor", TypeError, "hx", "tuple", "Tensor", hx=torch.zeros(1, 3, 5)),
    bad_call("three tensors", TypeError, "hx", "two tensors", "3", hx=(*states(1, 3, 5), torch.zeros(1))),
    bad_call("no cell", TypeError, "hx", "c_0", "NoneType", hx=(torch.zeros(1, 3, 5), None)),
    bad_call("rows of h", ValueError, "h_0", "(1, 3, 5)", "(1, 2, 5)", hx=states(1, 2, 5)),
    bad_call("size of h", ValueError, "h_0", "(1, 3, 5)", "(1, 3, 6)", hx=states(1, 3, 6)),
    bad_call("size of c", ValueError, "c_0", "(1, 3, 5)", "(1, 3, 4)", hx=(torch.zeros(1, 3, 5), torch.zeros(1, 3, 4))),
    bad_call("layers", ValueError, "h_0", "(2, 3, 5)", "(1, 3, 5)", module=BOTH, hx=states(1, 3, 5)),
    bad_call("rank of the state", ValueError, "h_0", "(1, 3, 5)", "(3, 5)", hx=states(3, 5)),
    bad_call(
        "batched state of an unbatched input",
        ValueError,
        "h_0",
        "(1, 5)",
        "(1, 1, 5)",
        input=torch.ones(6, 4),
        hx=states(1, 1, 5),
    ),
    bad_call(
        "batch first state",
        ValueError,
        "h_0",
        "(1, 3, 5)",
        "(3, 1, 5)",
        module=FIRST,
        input=torch.ones(3, 6, 4),
        hx=states(3, 1, 5),
    ),
    bad_call(
        "type of the state",
        ValueError,
        "h_0",
        "torch.float32",
        "torch.float64",
        hx=states(1, 3, 5, dtype=torch.float64),
    ),
    bad_call(
        "float64 cell",
        ValueError,
        "c_0",
        "torch.float32",
        "torch.float64",
        hx=(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5, dtype=torch.float64)),
    ),
    bad_call(
        "float32 h beside bfloat16",
        ValueError,
        "h_0",
        "torch.bfloat16",
        "torch.float32",
        module=NARROW,
        input=INPUT.bfloat16(),
        hx=states(1, 3, 5),
    ),
    bad_call("device of the state", ValueError, "h_0", "cpu", "meta", hx=states(1, 3, 5, device="meta")),
    # Lengths.
    bad_call("beyond T", ValueError, "lengths", "[0, 6]", "7", lengths=torch.tensor([6, 7, 1])),
    bad_call("negative", ValueError, "lengths", "[0, 6]", "-1", lengths=torch.tensor([6, -1, 1])),
    bad_call("list beyond T", ValueError, "lengths", "[0, 6]", "9", lengths=[6, 9, 1]),
    bad_call("float lengths", TypeError, "lengths", "integers", "torch.float32", lengths=torch.tensor([6.0, 1.0, 1.0])),
    bad_call("list of floats", TypeError, "lengths", "integers", "2.5", lengths=[6, 2.5, 1]),
    bad_call("bool lengths", TypeError, "lengths", "integers", "torch.bool", lengths=torch.ones(3, dtype=torch.bool)),
    bad_call("too few", ValueError, "lengths", "(3,)", "(2,)", lengths=torch.tensor([6, 1])),
    bad_call("rank of lengths", ValueError, "lengths", "(3,)", "(3, 1)", lengths=torch.ones(3, 1, dtype=torch.int64)),
    bad_call("an int", TypeError, "lengths", "tensor", "int", lengths=6),
    bad_call("a string", TypeError, "lengths", "tensor", "str", lengths="666"),
    bad_call("lengths unbatched", ValueError, "lengths", "unbatched", input=torch.ones(6, 4), lengths=[6]),
    bad_call(
        "lengths beside packed",
        ValueError,
        "lengths",
        "PackedSequence",
        input=pack_sequence([torch.ones(2, 4)]),
        lengths=[2],
    ),
    # Resets.
    bad_call(
        "reset in both directions",
        ValueError,
        "reset",
        "bidirectional",
        module=BOTH,
        reset=torch.zeros(6, 3, dtype=torch.bool),
    ),
    bad_call("float reset", TypeError, "reset", "torch.bool", "torch.float32", reset=torch.zeros(6, 3)),
    bad_call("list reset", TypeError, "reset", "bool tensor", "list", reset=[[False] * 3] * 6),
    bad_call("shape of reset", ValueError, "reset", "(6, 3)", "(3, 6)", reset=torch.zeros(3, 6, dtype=torch.bool)),
    bad_call(
        "reset of a batch first input",
        ValueError,
        "reset",
        "(3, 6)",
        "(6, 3)",
        module=FIRST,
        input=torch.ones(3, 6, 4),
        reset=torch.zeros(6, 3, dtype=torch.bool),
    ),
    bad_call("rank of reset", ValueError, "reset", "(6, 3)", "(6,)", reset=torch.zeros(6, dtype=torch.bool)),
    bad_call(
        "device of reset", ValueError, "reset", "cpu", "meta", reset=torch.zeros(6, 3, dtype=torch.bool, device="meta")
    ),
    # Seeds.
    bad_call("float seed", TypeError, "seed", "int", "float", module=ZONED, seed=0.5),
    bad_call("bool seed", TypeError, "seed", "int", "bool", module=ZONED, seed=True),
    bad_call("string seed", TypeError, "seed", "int", "str", module=ZONED, seed="1"),
    bad_call("float tensor seed", TypeError, "seed", "int64", "torch.float32", module=ZONED, seed=torch.tensor(0.5)),
    bad_call(
        "int32 tensor seed",
        TypeError,
        "seed",
        "int64",
        "torch.int32",
        module=ZONED,
        seed=torch.tensor(1, dtype=torch.int32),
    ),
    bad_call("seed of rank 1", ValueError, "seed", "0-dim", "(1,)", module=ZONED, seed=torch.tensor([1])),
    bad_call("seed that is not used", TypeError, "seed", "int", "float", seed=0.5),
    bad_call("generator and seed", ValueError, "generator", "seed", module=ZONED, seed=1, generator=torch.Generator()),
    bad_call("an int as generator", TypeError, "generator", "torch.Generator", "int", module=ZONED, generator=3),
    # Arguments by the wrong name.
    bad_call("unknown argument", TypeError, "length", length=[6, 1, 1]),
]

WEIGHTS = [torch.ones(20, 4), torch.ones(20, 5), torch.ones(20), torch.ones(20)]


def functional(name: str, error: type[Exception], *words: str, parameters: Any, **keywords: Any) -> Bad:
    return Bad(name, lambda: lstm(INPUT, None, parameters, **keywords), error, words)


FUNCTIONAL = [
    functional("no parameters", ValueError, "parameters", parameters=[]),
    functional("a parameter too few", ValueError, "parameters", parameters=WEIGHTS[:3]),
    functional(
        "sizes that do not fit", ValueError, "weight_hh", parameters=[WEIGHTS[0], torch.ones(24, 6), *WEIGHTS[2:]]
    ),
    functional("not a tensor", TypeError, "parameters", parameters=[*WEIGHTS[:3], None]),
    functional("regularization", TypeError, "regularization", "dict", parameters=WEIGHTS, regularization={}),
]

TABLE = [*OPTIONS, *MODULES, *CALLS, *FUNCTIONAL]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name.replace(" ", "_"))
def test_bad_input(bad: Bad) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bad.error) as caught:
            bad.call()
    message = str(caught.value)
    for word in bad.words:
        assert word in message, f"{word!r} is missing in: {message}"


@pytest.mark.parametrize("bad", [bad for bad in TABLE if bad.words], ids=lambda bad: bad.name.replace(" ", "_"))
def test_message_starts_with_the_argument(bad: Bad) -> None:
    """``argument: expected …, got …; remedy``, wherever Python itself did not raise first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bad.error) as caught:
            bad.call()
    message = str(caught.value)
    if "unexpected keyword argument" in message:
        return
    assert ": expected " in message and " got " in message and ";" in message, message


def everything_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("bad", CALLS, ids=lambda bad: bad.name.replace(" ", "_"))
def test_nothing_is_changed(bad: Bad) -> None:
    """Parameters, running statistics and torch's own generator are as before a call that raised."""
    before = [everything_of(module) for module in CALLED]
    generator = torch.get_rng_state()
    with pytest.raises(bad.error):
        bad.call()
    for module, state in zip(CALLED, before, strict=True):
        after = everything_of(module)
        assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("training", [True, False])
def test_good_calls_after_bad_ones(training: bool) -> None:
    """The table's modules still work, and as copies do that have seen no bad call."""
    for bad in CALLS:
        with pytest.raises(bad.error):
            bad.call()
    for module in (PLAIN, ZONED, BOTH, NORMED):
        fresh, used = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
        assert torch.equal(fresh(INPUT, seed=1)[0], used(INPUT, seed=1)[0])


@pytest.mark.parametrize(
    "lengths",
    [[6, 6, 1], (0, 0, 0), torch.tensor([6, 3, 1], dtype=torch.int32), torch.tensor([6, 3, 1], dtype=torch.uint8)],
    ids=str,
)
def test_lengths_that_are_fine(lengths: Any) -> None:
    assert PLAIN(INPUT, lengths=lengths)[0].shape == (6, 3, 5)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63), torch.tensor(5)], ids=str)
def test_seeds_that_are_fine(seed: Any) -> None:
    assert ZONED(INPUT, seed=seed)[0].shape == (6, 3, 5)


def test_an_empty_batch_is_fine() -> None:
    for module in (PLAIN, ZONED, BOTH):
        output, (hidden, cell) = module(INPUT[:, :0])
        assert output.shape[:2] == (6, 0) and hidden.shape[1] == cell.shape[1] == 0
