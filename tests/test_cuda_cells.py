"""What the CUDA kernels do to one cell, compiled for the host: masks bit for bit, and the types that they store."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import native_build
import pytest
import torch
from torch import Tensor

from fusedreg.encoding import SAVE_NOTHING, encode_options
from fusedreg.layer import REVERSE, LayerOptions
from fusedreg.masks import layer_masks

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="not run: no compiler"),
]

SOURCE = Path(__file__).parent / "native" / "cuda_cells.cpp"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda_cells") / "libcuda_cells.so"
    flags = [flag for flag in native_build.common_flags() if not flag.startswith("-fvisibility")]
    command = [*native_build.find_compiler().command, *flags, "-shared", str(SOURCE), "-o", str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return ctypes.CDLL(str(library))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _converted(function: object, values: Tensor, dtype: torch.dtype, *more: object) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype)
    function(_address(values), _address(result), ctypes.c_int64(values.numel()), *more)  # type: ignore[operator]
    return result


def _every_pattern() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


TYPES = [pytest.param("bfloat16", torch.bfloat16, id="bfloat16"), pytest.param("float16", torch.float16, id="float16")]


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_every_16_bit_pattern_goes_there_and_back(cells: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    patterns = _every_pattern()
    wide = _converted(cells[f"widen_{name}"], patterns, torch.float32)
    assert torch.equal(wide.nan_to_num(7.0), patterns.view(dtype).float().nan_to_num(7.0))
    assert torch.equal(wide.isnan(), patterns.view(dtype).isnan())
    back = _converted(cells[f"narrow_to_{name}"], wide, torch.int16)
    number = ~wide.isnan()
    assert torch.equal(back[number], patterns[number])
    assert back[~number].view(dtype).isnan().all()


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_rounding_is_to_nearest_and_to_even(cells: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    """Each representable number, the halfway point to the next, a float32 step on either side of it, and anything."""
    finite = _every_pattern().view(dtype).float()
    finite = finite[finite.isfinite()].sort().values
    halves = ((finite[:-1].double() + finite[1:].double()) / 2).float()
    up, down = torch.full_like(halves, torch.inf), torch.full_like(halves, -torch.inf)
    random = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    edges = torch.tensor([65519.996, 65520.0, 3.3895e38, 3.4e38, torch.inf, 1e-45, 2.0**-25, 2.0**-24, 0.0])
    values = torch.cat([finite, halves, halves.nextafter(up), halves.nextafter(down), random, edges, -edges])
    made = _converted(cells[f"narrow_to_{name}"], values, torch.int16).view(dtype)
    expected = values.to(dtype)
    assert torch.equal(made.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(made[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("is_tanh", [False, True], ids=["sigmoid", "tanh"])
def test_gates_are_kept_to_the_last_bit_of_their_fixed_point(cells: ctypes.CDLL, is_tanh: bool) -> None:
    low = -1.0 if is_tanh else 0.0
    values = torch.cat([torch.linspace(low, 1.0, 65_535), torch.tensor([low, 1.0, torch.nan])])
    kept = _converted(cells["keep_activations"], values, torch.int16, ctypes.c_bool(is_tanh))
    assert kept[-2] == 32767 and kept[-3] == -32767
    assert kept[-1] == -32768, "NaN has a mark of its own"
    back = _converted(cells["kept_activations"], kept, torch.float32, ctypes.c_bool(is_tanh))
    assert back[-1].isnan()
    step = (1.0 if is_tanh else 0.5) / 32767
    assert (back[:-1] - values[:-1]).abs().max() <= step / 2 + 6e-8
    again = _converted(cells["keep_activations"], back, torch.int16, ctypes.c_bool(is_tanh))
    assert torch.equal(again, kept), "what has been kept once is kept exactly"


MASKS = [
    pytest.param(LayerOptions(layer=1, zoneout_hidden=0.3, zoneout_cell=0.5, update_dropout=0.2), id="step"),
    pytest.param(LayerOptions(dropout=0.4, output_dropout=0.25, hidden_dropout=0.5, direction=REVERSE), id="outputs"),
    pytest.param(LayerOptions(layer=2, hidden_dropout=0.6, gate_masks="untied", cell_dropout=0.1), id="untied"),
    pytest.param(LayerOptions(update_dropout=0.35, update_mask="sequence", dropout=0.999), id="sequence"),
    pytest.param(
        LayerOptions(
            layer=3,
            direction=REVERSE,
            dropout=0.1,
            hidden_dropout=0.2,
            output_dropout=0.3,
            update_dropout=0.4,
            cell_dropout=0.5,
            zoneout_hidden=0.6,
            zoneout_cell=0.7,
        ),
        id="all",
    ),
]


def _drawn(cells: ctypes.CDLL, options: LayerOptions, seed: Tensor, shape: tuple[int, int, int]) -> list[Tensor]:
    rates, flags, _ = encode_options(options, SAVE_NOTHING)
    of_rates, of_flags = torch.tensor(rates, dtype=torch.float64), torch.tensor(flags)
    of_steps = torch.empty(5, *shape, dtype=torch.float64)
    of_hidden = torch.empty(4, *shape[1:], dtype=torch.float64)
    rows_a_group = shape[1] // seed.shape[0] if seed.dim() == 2 else 0
    given = [_address(of_rates), _address(of_flags), _address(seed), *map(ctypes.c_int64, (rows_a_group, *shape))]
    cells.draw_masks(*given, _address(of_steps), _address(of_hidden))
    return [*of_steps, of_hidden]


def _inverted(dropped: Tensor | None, rate: float, shape: tuple[int, ...]) -> Tensor:
    if dropped is None:
        return torch.ones(shape, dtype=torch.float64)
    return ((~dropped).double() * (1.0 / (1.0 - rate))).expand(shape)


GROUPED = [[0x0123456789ABCDEF, 0], [-1, 3], [5, 2**31]]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF, GROUPED[1:2], GROUPED], ids=str)
def test_masks_are_those_of_the_counter(cells: ctypes.CDLL, options: LayerOptions, seed: int | list[list[int]]) -> None:
    shape = steps, rows, hidden = 5, 6, 37
    of_seed = torch.tensor(seed)
    update, cell, zone_hidden, zone_cell, output, of_hidden = _drawn(cells, options, of_seed, shape)
    sizes = {"steps": steps, "rows": rows, "input_size": 2, "hidden_size": hidden, "output_size": hidden}
    masks = layer_masks(of_seed, options, **sizes)
    nothing = torch.zeros(shape, dtype=torch.bool)
    assert torch.equal(zone_hidden, (nothing if masks.zoneout_hidden is None else masks.zoneout_hidden).double())
    assert torch.equal(zone_cell, (nothing if masks.zoneout_cell is None else masks.zoneout_cell).double())
    assert torch.equal(update, _inverted(masks.update_dropout, options.update_dropout, shape))
    kept_cells = _inverted(masks.cell_dropout, 0.0, shape)  # not inverted: no scale
    assert torch.equal(cell, kept_cells)
    locked = _inverted(masks.output_dropout, options.output_dropout, shape)
    assert torch.equal(output, locked * _inverted(masks.dropout, options.dropout, shape))
    dropped = masks.hidden_dropout
    if dropped is not None and dropped.dim() == 3:
        dropped = dropped.transpose(0, 1)
    assert torch.equal(of_hidden, _inverted(dropped, 0.0, (4, rows, hidden)))  # the product's result is scaled


def test_evaluation_draws_nothing_and_expects(cells: ctypes.CDLL) -> None:
    rates = {"dropout": 0.1, "hidden_dropout": 0.2, "output_dropout": 0.3, "update_dropout": 0.4, "cell_dropout": 0.5}
    options = LayerOptions(training=False, zoneout_hidden=0.6, zoneout_cell=0.7, **rates)
    values = _drawn(cells, options, torch.tensor(3), (2, 3, 4))
    for made, expected in zip(values, (1.0, 0.5, 0.6, 0.7, 1.0, 1.0), strict=True):
        assert (made == expected).all()


def test_without_a_rate_masks_change_nothing(cells: ctypes.CDLL) -> None:
    for training in (False, True):
        values = _drawn(cells, LayerOptions(training=training), torch.tensor(3), (2, 3, 4))
        for made, expected in zip(values, (1.0, 1.0, 0.0, 0.0, 1.0, 1.0), strict=True):
            assert (made == expected).all()
