"""Triton's forward under its interpreter: the kernels of a step on any grid, and the persistent kernel.

One seed of the kernel's is held against the budget of eight of the reference's: the interpreter is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from helpers import REGULARIZERS
from triton_switching import switching_programs

import fusedreg
from fusedreg.backends.triton import configurations, forward_loop, forward_step, layer
from fusedreg.layer import REVERSE
from fusedreg.masks import masks
from fusedreg.regularization import BatchNorm
from fusedreg.testing import LayerCase, check_report, compare, implementation, make_arguments, run_layer
from fusedreg.testing.budget import baseline

MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "ragged": {"ragged": True, "resets": True},
    "reverse": {"direction": REVERSE, "ragged": True, "resets": True},
    "evaluation": {"training": False, "ragged": True},
}


def case_of(name: str, mode: str = "ragged", **changes: object) -> LayerCase:
    regularization = REGULARIZERS[name]
    case = LayerCase(f"{name}-{mode}", steps=4, regularization=regularization)
    if isinstance(regularization.norm, BatchNorm):
        case = replace(case, rows=12, hidden_size=10)
    return replace(case, **{**MODES[mode], **changes})  # type: ignore[arg-type]


def check(case: LayerCase) -> None:
    """The forward's results against the float64 reference, within the budget."""
    base = baseline(case, 8)
    run = run_layer(implementation("triton"), case, base.arguments[0], backward=False)
    exact = {name: value for name, value in base.values[0].items() if not name.startswith("grad ")}
    report, faults = compare([run], [exact], {name: base.eager[name] for name in exact}, case.dtype)
    check_report(case.id, report, faults)


def use_kernels(monkeypatch: pytest.MonkeyPatch, *, persistent: bool, programs: int = 1) -> None:
    limits = configurations.Device(programs, 10**6)
    monkeypatch.setattr(configurations, "device_limits", lambda device: limits)
    chosen = functools.partial(configurations.forward_configuration, persistent=persistent)
    monkeypatch.setattr(forward_loop, "forward_configuration", chosen)


ALONE = [name for name in REGULARIZERS if "everything" not in name]
TOGETHER = [name for name in REGULARIZERS if "everything" in name]


@pytest.mark.parametrize("name", ALONE)
def test_each_option(name: str) -> None:
    check(case_of(name, "ragged"))


@pytest.mark.parametrize("mode", ["reverse", "evaluation"])
@pytest.mark.parametrize("name", ["none", *TOGETHER])
def test_everything(name: str, mode: str) -> None:
    check(case_of(name, mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["everything", "everything_untied", "everything_batch_norm", "everything_layer_norm"])
def test_16_bit_types(name: str, dtype: torch.dtype) -> None:
    check(case_of(name, "ragged", dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 1, "hidden_size": 1, "input_size": 1, "steps": 3},
        {"rows": 18, "hidden_size": 37, "input_size": 131, "steps": 3},  # several tiles of units and of rows
        {"rows": 66, "hidden_size": 9, "steps": 2},
    ],
    ids=lambda changes: "B{rows}H{hidden_size}".format(**changes),
)
@pytest.mark.parametrize("name", ["everything_untied", "everything_tied_layer_norm", "everything_batch_norm"])
def test_shapes(name: str, changes: dict[str, object]) -> None:
    one_row = "batch_norm" in name and changes["rows"] == 1  # which a batch norm does not take in training
    check(case_of(name, "evaluation" if one_row else "reverse", **changes))


def test_optional_arguments() -> None:
    check(case_of("everything", bias=False, initial_state=False, return_cells=False))


def test_padding_may_hold_anything() -> None:
    case = case_of("everything_batch_norm", "reverse")
    arguments = make_arguments(case, 0)
    clean = run_layer(implementation("triton"), case, arguments, backward=False)
    assert arguments.lengths is not None
    padding = torch.arange(case.steps).unsqueeze(1) >= arguments.lengths
    spoilt = arguments.input.clone()
    spoilt[padding] = float("nan")
    for name, value in run_layer(
        implementation("triton"), case, arguments._replace(input=spoilt), backward=False
    ).items():
        assert torch.equal(value, clean[name]), name


def test_zoneout_selects() -> None:
    """What is zoned out does not reach the state, not even as NaN times zero: one bad input spoils one candidate."""
    module = fusedreg.LSTM(4, 33, zoneout_hidden=0.5, zoneout_cell=0.5, backend="triton")
    input = torch.randn(1, 5, 4)
    input[0, 2, 1] = float("nan")
    with torch.no_grad():
        output, (h_n, c_n) = module(input, seed=3)
    drawn = masks(3, module.regularization, input_size=4, hidden_size=33, batch_size=5, steps=1)["l0"]
    for value, zone in ((h_n[0], drawn.zoneout_hidden), (c_n[0], drawn.zoneout_cell)):
        assert zone is not None
        assert not value[torch.arange(5) != 2].isnan().any()
        assert torch.equal(value[2].isnan(), ~zone[0, 2])
    assert torch.equal(output[0].isnan(), h_n[0].isnan())


def test_an_empty_batch() -> None:
    module = fusedreg.LSTM(4, 5, backend="triton")
    output, (h_n, c_n) = module(torch.zeros(3, 0, 4))
    assert output.shape == (3, 0, 5)
    assert h_n.shape == c_n.shape == (1, 0, 5)


# ---- The persistent kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", *TOGETHER])
def test_persistent_in_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, persistent=True)
    check(case_of(name, "reverse"))


@pytest.mark.parametrize(
    ("name", "rows", "hidden_size", "programs"),
    [
        ("everything", 5, 19, 3),
        ("everything_untied", 70, 12, 4),  # two groups of rows
        ("everything_batch_norm", 20, 17, 3),
        ("everything_layer_norm", 5, 19, 3),
        ("layer_norm_cell", 2, 30, 4),  # more programs than rows
    ],
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_persistent_in_several_programs(
    name: str, rows: int, hidden_size: int, programs: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, persistent=True, programs=programs)
    if resident:
        monkeypatch.setattr(configurations, "product_precision", lambda dtype: "tf32")  # the interpreter has but one
    with switching_programs(seed=rows + hidden_size) as used:
        check(case_of(name, "ragged", rows=rows, hidden_size=hidden_size, steps=3))
    assert used.largest_grid == programs


def test_the_harness_finds_a_missing_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    @triton.jit
    def wait_for(arrivals, target):  # type: ignore[no-untyped-def]
        pass

    use_kernels(monkeypatch, persistent=True, programs=3)
    monkeypatch.setattr(forward_step, "wait_for", wait_for)
    with switching_programs(seed=1), pytest.raises(AssertionError, match="none-plain"):
        check(case_of("none", "plain", hidden_size=19))


def test_the_harness_finds_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    @triton.jit
    def arrive(arrivals):  # type: ignore[no-untyped-def]
        pass

    use_kernels(monkeypatch, persistent=True, programs=3)
    monkeypatch.setattr(forward_step, "arrive", arrive)
    monkeypatch.setattr("triton_switching._MOST_TURNS", 300)
    with switching_programs(seed=1), pytest.raises(Exception, match="300 turns"):
        check(case_of("none", "plain", hidden_size=19))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- What memory safety needs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "wrong", "name"),
    [
        (1, torch.zeros(8, 3), "weight_ih"),
        (2, torch.zeros(8), "weight_hh"),
        (5, torch.zeros(2, 3), "weight_hr"),
        (6, torch.zeros(2, 2, dtype=torch.float64), "initial_hidden"),
        (8, torch.zeros(3, dtype=torch.int64), "lengths"),
        (10, None, "seed"),
        (10, torch.zeros(3, 2, dtype=torch.int64), "seed.*divides the 2 rows"),
        (10, torch.zeros(2, 3, dtype=torch.int64), "seed"),
        (17, torch.zeros(4, 2, 3), "hidden_probe"),
        (27, [0.0], "rates"),
    ],
)
@pytest.mark.parametrize("end", ["forward", "backward"])
def test_arguments_that_do_not_fit_are_refused(end: str, place: int, wrong: object, name: str) -> None:
    input, weight_ih, weight_hh = torch.zeros(4, 2, 3), torch.zeros(8, 3), torch.zeros(8, 2)
    rates, options = [0.0] * 8 + [0.5], [0, 0, 1, *[0] * 10, 1, 1]
    arguments: list[object] = [input, weight_ih, weight_hh, *[None] * 7, torch.tensor(1), *[None] * 16, rates, options]
    arguments[place] = wrong if place != 1 else torch.zeros(8, 4)
    arguments.append(0.0)
    if end == "backward":
        saved = [torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), torch.zeros(4, 2, 8), *[torch.zeros(0)] * 4]
        arguments = [*[None] * 4, *arguments[:27], *saved, *arguments[27:], [True] * 14 + [False] * 2]
    with pytest.raises(RuntimeError, match=name):
        getattr(layer, end)(*arguments)


def test_what_was_not_saved_is_refused() -> None:
    input, weight_ih, weight_hh = torch.zeros(4, 2, 3), torch.zeros(8, 3), torch.zeros(8, 2)
    given = [*[None] * 4, input, weight_ih, weight_hh, *[None] * 24]
    kept = [torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), torch.zeros(4, 2, 7), *[torch.zeros(0)] * 4]
    for save, name in ((0, "saved for the backward"), (1, "gates")):
        with pytest.raises(RuntimeError, match=name):
            layer.backward(*given, *kept, [0.0] * 9, [*[0] * 13, save, 1], 0.0, [True] * 14 + [False] * 2)
