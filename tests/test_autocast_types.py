"""Under ``torch.autocast`` results have the types that ``nn.LSTM`` and ``nn.LSTMCell`` give there, on each device.

On a CPU torch is asked. For a GPU that is not there, what torch's lists of autocast operators say: fake tensors carry a
device and a type, and no values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedreg
from fusedreg import backends
from fusedreg.autocast import autocast
from fusedreg.encoding import SAVE_GATES, encode_options, tensor_arguments
from fusedreg.functional import LSTMResult, lstm
from fusedreg.layer import LayerOptions, LayerParameters

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
KINDS = ["padded", "packed", "projected", "projected and packed", "cell"]


def given(*types: torch.dtype) -> list[tuple[torch.dtype, Any]]:
    """Types of the input, and of ``h_0`` and ``c_0``: every combination."""
    return list(itertools.product(types, (None, *itertools.product(types, repeat=2))))


GIVEN = given(SINGLE, BRAIN)


def make(kind: str, library: Any, **options: Any) -> nn.Module:
    if kind == "cell":
        return library.LSTMCell(3, 4, **options)  # type: ignore[no-any-return]
    return library.LSTM(3, 4, proj_size=2 if "projected" in kind else 0, **options)  # type: ignore[no-any-return]


def arguments(kind: str, input_type: torch.dtype, state_types: Any, device: str = "cpu") -> tuple[Any, Any]:
    """Of a call of such a module."""
    input: Any = torch.ones((2, 3) if kind == "cell" else (5, 2, 3), dtype=input_type, device=device)
    if "packed" in kind:
        input = pack_sequence([input[:, 0], input[:3, 1]])
    if state_types is None:
        return input, None
    layers = () if kind == "cell" else (1,)
    sizes = (2 if "projected" in kind else 4, 4)
    return input, tuple(
        torch.ones(*layers, 2, size, dtype=dtype, device=device) for size, dtype in zip(sizes, state_types, strict=True)
    )


def results(returned: Any) -> list[Tensor]:
    """The tensors of what a module returned."""
    if isinstance(returned[0], PackedSequence):
        return [returned[0].data, *returned[1]]
    return [returned[0], *returned[1]] if isinstance(returned[1], tuple) else list(returned)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize("parameter_type", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_they_are_torchs(kind: str, parameter_type: torch.dtype, backend: str) -> None:
    """Every combination of types, in both 16-bit types; and the same numbers, within those types' precision."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("not run: nn.LSTM has these types with AVX-512 and without float16 matrix instructions")
    torch.manual_seed(0)
    theirs = make(kind, nn, dtype=parameter_type)
    ours = make(kind, fusedreg, dtype=parameter_type, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    # What is given decides; that parameters do not is seen without a state.
    combinations = [
        pair for pair in given(SINGLE, BRAIN, HALF) if parameter_type == SINGLE or pair[1] in (None, (HALF, SINGLE))
    ]
    for (input_type, state_types), dtype in itertools.product(combinations, (BRAIN, HALF)):
        input, hx = arguments(kind, input_type, state_types)
        with torch.autocast("cpu", dtype):
            found = results(ours(input, hx))
            if kind == "padded" and dtype == HALF and input_type != HALF:  # oneDNN has no such LSTM on most processors
                assert [value.dtype for value in found] == [HALF] * 3
                continue
            expected = results(theirs(input, hx))
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value.float(), right.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_carried_cell_beside_another_width(kind: str) -> None:
    """A float64 model takes a narrower ``c_0``; a cell takes a float64 ``c`` beside anything, and gives that back."""
    torch.manual_seed(0)
    cases = [(DOUBLE, DOUBLE, cell) for cell in (SINGLE, BRAIN, HALF)]
    cases += [(SINGLE, hidden, DOUBLE) for hidden in (SINGLE, BRAIN) if kind == "cell"]
    for input_type, *state_types in cases:
        theirs, ours = (make(kind, library, dtype=input_type) for library in (nn, fusedreg))
        ours.load_state_dict(theirs.state_dict())
        input, hx = arguments(kind, input_type, state_types)
        with torch.autocast("cpu", BRAIN):
            found, expected = results(ours(input, hx)), results(theirs(input, hx))
        tolerance = {"rtol": 0.03, "atol": 0.03} if input_type == SINGLE else {}
        for value, right in zip(found, expected, strict=True):
            assert value.dtype == right.dtype == DOUBLE
            torch.testing.assert_close(value, right, **tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["padded", "projected", "cell"])
def test_without_values(kind: str) -> None:
    """Autocast does not know of the device "meta": nothing is cast there, as in torch."""
    for library in (nn, fusedreg):
        with torch.autocast("cpu", BRAIN):
            found = results(make(kind, library, device="meta")(*arguments(kind, SINGLE, None, "meta")))
        assert {value.dtype for value in found} == {SINGLE}


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_refused_as_without_autocast(kind: str) -> None:
    input, hx = arguments(kind, torch.int64, None)
    with (
        torch.autocast("cpu", BRAIN),
        pytest.raises(ValueError, match=r"input: expected torch\.float32.*got torch\.int64"),
    ):
        make(kind, fusedreg)(input, hx)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_parameters(kind: str) -> None:
    module = make(kind, fusedreg)
    input, hx = arguments(kind, SINGLE, (SINGLE, SINGLE))
    with torch.autocast("cpu", BRAIN):
        sum(value.float().sum() for value in results(module(input, hx))).backward()  # type: ignore[union-attr]
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == SINGLE
        assert parameter.grad.abs().sum() > 0


def test_a_carried_cell_is_not_rounded() -> None:
    """Two steps of a cell: the float32 ``c`` between them is what an LSTM carries inside; another 16-bit type fits."""
    torch.manual_seed(0)
    cell, lstm_module = fusedreg.LSTMCell(3, 4), fusedreg.LSTM(3, 4)
    lstm_module.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    input = torch.randn(2, 5, 3)
    with torch.autocast("cpu", BRAIN):
        _, carried = cell(input[1], cell(input[0]))
        cells = lstm_module(input, return_cell_states=True).cell_states
        assert torch.equal(carried, cells[1])
        large = torch.full((5, 4), 1e38, dtype=BRAIN)
    with torch.autocast("cpu", HALF):
        assert cell(input[0], (torch.zeros(5, 4), large))[1].isfinite().all()


def test_a_bad_state_is_named_as_without_autocast() -> None:
    with torch.autocast("cpu", BRAIN):
        with pytest.raises(TypeError, match="expected c to be a tensor, got int"):
            fusedreg.LSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), 3))
        with pytest.raises(ValueError, match=r"expected c of shape \(2, 4\), got \(2, 5\)"):
            fusedreg.LSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 5)))


def test_float64_is_left_alone() -> None:
    for kind in KINDS:
        with torch.autocast("cpu", BRAIN):
            found = results(make(kind, fusedreg, dtype=DOUBLE)(*arguments(kind, DOUBLE, (DOUBLE, DOUBLE))))
        assert [value.dtype for value in found] == [DOUBLE] * len(found)


@compiled
@pytest.mark.compile
@pytest.mark.parametrize(("kind", "outside"), [("projected", True), ("cell", False)])
def test_in_compiled_code(kind: str, outside: bool) -> None:
    """Autocast around the compiled region, and inside of it."""
    torch.manual_seed(0)
    module = make(kind, fusedreg)
    input, hx = arguments(kind, SINGLE, (SINGLE, SINGLE))

    def inside(*given: Any) -> Any:
        with torch.autocast("cpu", BRAIN):
            return module(*given)

    compiled_call = torch.compile(module if outside else inside, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", BRAIN, enabled=outside):
        found = results(compiled_call(input, hx))
    for value, right in zip(found, results(inside(input, hx)), strict=True):
        assert value.dtype == right.dtype
        assert torch.equal(value, right)


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """``torch.autocast("cuda")`` turns itself off where no GPU is; the state it sets does not."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BRAIN)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.usefixtures("cuda_autocast")
@pytest.mark.parametrize("kind", ["padded", "projected", "cell"])
@pytest.mark.parametrize(("input_type", "state_types"), GIVEN)
def test_the_cast_of_a_gpus_tensors(kind: str, input_type: torch.dtype, state_types: Any) -> None:
    """``_cudnn_rnn`` and ``lstm_cell`` are cast as a whole; a float32 ``c_0`` goes into our kernels as it is."""
    with FakeTensorMode():
        input, hx = arguments(kind, input_type, state_types, "cuda")
        sizes = {"weight_ih": (16, 3), "weight_hh": (16, 2 if kind == "projected" else 4)}
        weights = {name: torch.empty(size, device="cuda") for name, size in sizes.items()}
        if kind == "projected":
            weights["weight_hr"] = torch.empty(2, 4, device="cuda")
        cast = autocast(input, hx, [LayerParameters(**weights)], of_cell=kind == "cell")
        assert autocast(torch.empty(2, 3), None, [LayerParameters(**weights)]) is None  # the CPU has its own
    assert cast is not None
    assert (cast.hidden_type, cast.cell_type) == (BRAIN, BRAIN)
    assert cast.input.dtype == BRAIN
    assert {weight.dtype for weight in cast.layers[0] if weight is not None} == {BRAIN}
    if state_types is not None:
        assert [state.dtype for state in cast.hx] == [BRAIN, state_types[1]]


@compiled
@pytest.mark.usefixtures("cuda_autocast")
@pytest.mark.skipif(torch.version.cuda is None, reason="not run: a torch with CUDA, for the views of its fake tensors")
@pytest.mark.parametrize("kind", ["padded", "projected", "cell"])
@pytest.mark.parametrize(("input_type", "state_types"), GIVEN)
def test_on_a_gpu_that_is_not_there(
    kind: str, input_type: torch.dtype, state_types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole call on fake tensors: every result on the GPU, in torch's type."""
    monkeypatch.setattr(backends.cuda, "load", lambda: backends.Availability(True))
    monkeypatch.setattr(backends.cuda, "_too_old", lambda index: "")
    with FakeTensorMode():
        input, hx = arguments(kind, input_type, state_types, "cuda")
        module = make(kind, fusedreg, backend="cuda", device="meta")
        weights = {
            name: torch.empty(value.shape, device="cuda", requires_grad=True)
            for name, value in module.named_parameters()
        }
        if kind == "cell":
            returned = torch.func.functional_call(module, weights, (input, hx))
            torchs = torch.func.functional_call(make(kind, nn, device="meta"), weights, (input, hx))
            assert [value.dtype for value in torchs] == [BRAIN, BRAIN]
        else:
            returned = lstm(input, hx, weights, backend="cuda")
            assert isinstance(returned, LSTMResult)
        found = results(returned)
    assert {value.dtype for value in found} == {BRAIN}
    assert {value.device.type for value in found} == {"cuda"}


@compiled
@pytest.mark.compile
@pytest.mark.usefixtures("cuda_autocast")
@pytest.mark.skipif(torch.version.cuda is None, reason="not run: a torch with CUDA, for the views of its fake tensors")
def test_a_graph_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for export: masks are drawn on the device, and every layer gets autocast's type."""
    monkeypatch.setattr(backends.cuda, "load", lambda: backends.Availability(True))
    monkeypatch.setattr(backends.cuda, "_too_old", lambda index: "")

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fusedreg.LSTM(3, 4, 2, backend="cuda", zoneout_cell=0.2, device="meta")
            self.cell = fusedreg.LSTMCell(4, 4, backend="cuda", device="meta")
            for module in (self.lstm, self.cell):
                for name, parameter in module.named_parameters():
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))

        def forward(self, input: Tensor) -> Any:
            return self.cell(self.lstm(input).output[0])

    with FakeTensorMode():
        program = torch.export.export(Policy(), (torch.empty(5, 2, 3, device="cuda"),), strict=True)
    layers = [node for node in program.graph.nodes if "lstm_layer_forward" in str(node.target)]
    (seed,) = [node for node in program.graph.nodes if "draw_seed" in str(node.target)]
    assert len(layers) == 3
    for node in layers:
        assert [value.dtype for value in node.meta["val"][:3]] == [BRAIN, BRAIN, SINGLE]
        assert {value.device.type for value in node.meta["val"]} == {"cuda"}
    assert seed.meta["val"].device.type == "cuda"


@compiled
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE], ids=str)
def test_the_operators_on_a_gpu_that_is_not_there(dtype: torch.dtype) -> None:
    """Forward and backward on fake tensors: everything stays on the device; the cells are wide."""
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    rates, options, epsilon = encode_options(LayerOptions(zoneout_cell=0.5), SAVE_GATES)
    with FakeTensorMode():
        empty = functools.partial(torch.empty, device="cuda")
        weights = LayerParameters(*(empty(size, dtype=dtype) for size in ((16, 3), (16, 4), (16,), (16,))))
        tensors = tensor_arguments(
            empty(5, 2, 3, dtype=dtype), None, None, weights, None, None, empty((), dtype=torch.int64), None, None
        )
        forward = torch.ops.fusedreg.lstm_layer_forward(*tensors, rates, options, epsilon)
        needed = [position < 5 for position in range(16)]
        output, _, _, cells, _, *rest = forward
        backward = torch.ops.fusedreg.lstm_layer_backward(
            output, None, None, None, *tensors, cells, output, *rest, rates, options, epsilon, needed
        )
    assert {value.device.type for value in (*forward, *backward)} == {"cuda"}
    assert [value.dtype for value in forward[:4]] == [dtype, dtype, wide, wide]
    assert [value.dtype for value in backward[:5]] == [dtype] * 5
    assert [tuple(value.shape) for value in backward[:5]] == [(5, 2, 3), (16, 3), (16, 4), (16,), (16,)]
