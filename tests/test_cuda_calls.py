"""What a call of the CUDA operators asks of torch, on the emulated device: allocations, products, what is kept.

None of it may grow with the number of steps in the persistent tiers; results and gradients are other tests' business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cuda_build
import pytest
import torch
from emulated_cuda import TIERS, emulated, lstm_layer, use
from test_parity import case_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fusedreg.encoding import encode_options, hidden_differs
from fusedreg.layer import LayerParameters
from fusedreg.regularization import LayerNorm
from fusedreg.testing import LayerCase, make_arguments
from fusedreg.testing.cases import LayerArguments

PERSISTENT = [tier for tier in TIERS if tier != "step"]
PRODUCTS = ("aten::mm", "aten::bmm")
ALLOCATION = "aten::empty"


def counted(work: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What ``work`` returns, and how often each of torch's operators ran: `aten::empty` allocates."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = work()
    return result, Counter(event.name for event in recorded.events())


def forward_and_backward(case: LayerCase, tier: str) -> tuple[Counter[str], Counter[str]]:
    """What a forward and its backward ask of torch, with a gradient for the input and all parameters."""
    given = make_arguments(case, 0)
    wanted = [given.input, *(one for one in given.parameters if one is not None)]
    for one in wanted:
        one.requires_grad_()
    with use(tier):
        output, before = counted(lambda: called(case, given).output)
        ones = torch.ones_like(output)
        _, after = counted(lambda: torch.autograd.grad(output, wanted, ones))
    return before, after


def called(case: LayerCase, given: LayerArguments) -> Any:
    keywords = {"lengths": given.lengths, "reset": given.reset, "seed": given.seed, "running": given.running}
    return lstm_layer(*given[:4], case.options, **keywords)


@emulated
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(
    ("name", "before_loop", "after_loop"),
    [
        ("none", 1, 3),
        ("everything", 1, 3),
        ("everything_batch_norm", 1, 3),
        ("everything_untied", 4, 12),
        ("everything_layer_norm", 4, 12),  # untied too
    ],
)
def test_a_persistent_call_is_the_same_for_any_number_of_steps(
    name: str, before_loop: int, after_loop: int, recompute: bool
) -> None:
    """``r`` before the loop; ``dW_hh``, ``dW_ih`` and ``dx`` after it, each one product, or one a gate if untied."""
    rebuilt = 2 * before_loop if recompute else 0  # both terms
    for tier in PERSISTENT:
        short, long = (
            forward_and_backward(case_of(name, steps=steps, recompute=recompute, ragged=True), tier) for steps in (2, 5)
        )
        assert short == long, tier
        products = [sum(part[product] for product in PRODUCTS) for part in short]
        assert products == [before_loop, after_loop + rebuilt], tier
        assert short[0][ALLOCATION] > 0, "allocations are not seen"


@emulated
def test_the_step_tier_allocates_nothing_for_a_step() -> None:
    """It has a product for each, and this is where the counting is seen to count."""
    short, long = (forward_and_backward(case_of("everything", steps=steps), "step") for steps in (2, 5))
    for one, other in zip(short, long, strict=True):
        assert one[ALLOCATION] == other[ALLOCATION] > 0
        assert other["aten::mm"] == one["aten::mm"] + 3


def kept(case: LayerCase, given: LayerArguments) -> list[Tensor]:
    """What autograd keeps of a call besides its arguments and results."""
    saved: list[Tensor] = []
    parameters = LayerParameters(*(None if one is None else one.requires_grad_() for one in given.parameters))  # type: ignore[arg-type]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = called(case, given._replace(parameters=parameters))
    known = storages([*given.tensors(), *result[:3]])
    unknown = {place: tensor for tensor in saved for place in storages([tensor]) if place not in known}
    return list(unknown.values())


def storages(tensors: Sequence[Tensor | None]) -> set[int]:
    return {one.untyped_storage().data_ptr() for one in tensors if one is not None and one.numel()}


def statistics_of(case: LayerCase) -> int:
    """How many values the means and deviations are: of a row with layer norm, of a column with batch norm."""
    if case.regularization.norm is None:
        return 0
    columns = 3 * case.rows if isinstance(case.regularization.norm, LayerNorm) else (4 + 4 + 1) * case.hidden_size
    return 2 * case.steps * columns


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(
    "name",
    ["none", "zoneout_hidden", "everything", "batch_norm", "everything_batch_norm", "layer_norm"],
)
def test_what_is_kept_for_the_backward(name: str, recompute: bool, dtype: torch.dtype) -> None:
    """Gates and ``c``, 5H values a step and row; with a norm both raw pre-activations, 9H; with recompute ``c`` alone.

    Besides: ``h`` where it is not the output, which makes 2H with recompute, and a norm's statistics.
    """
    case = replace(case_of(name, steps=3, dtype=dtype, recompute=recompute), return_cells=False)
    rates, flags, _ = encode_options(case.options, 0)
    has_norm = case.regularization.norm is not None
    gates = 0 if recompute else 8 if has_norm else 4
    differs = hidden_differs(rates, flags)
    cells = case.steps * case.rows * case.hidden_size
    with use("grid"):
        found = kept(case, make_arguments(case, 0))
    assert sum(one.numel() for one in found) == (gates + 1 + differs) * cells + statistics_of(case)
    # Activated gates and h have the width of the inputs; cells, raw pre-activations and statistics are float32.
    storage = dtype.itemsize
    width = (4 if has_norm else storage) * gates + 4 + storage * differs
    assert sum(one.numel() * one.element_size() for one in found) == width * cells + 4 * statistics_of(case)


def test_no_atomics() -> None:
    """A sum by atomics comes in another order each time."""
    sources = [
        path for folder in (cuda_build.SOURCES, cuda_build.SOURCES.parent / "common") for path in folder.glob("*")
    ]
    assert len(sources) > 50
    for path in sources:
        if path.is_file():
            assert not re.search(r"\batomic[A-Z]\w*\s*\(|\b(atom|red)\.", path.read_text()), path
