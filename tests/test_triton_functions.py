"""The Triton functions that all kernels share, under Triton's interpreter: masks, the cell, storage types."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")

from fusedreg import reference  # noqa: E402
from fusedreg.backends.triton import jit_cell, jit_masks, jit_storage  # noqa: E402
from fusedreg.layer import LayerOptions, LayerParameters  # noqa: E402

mask_contract = importlib.import_module("fusedreg.masks")  # the package has a function of this name


@triton.jit
def draw_steps(seed, words, first, stream, ROWS: tl.constexpr, UNITS: tl.constexpr):
    unit, row = tl.arange(0, UNITS)[None, :], tl.arange(0, ROWS)[:, None]
    k0, k1 = jit_masks.load_key(seed)
    at = words + row * UNITS + unit
    drawn = jit_masks.step_words(unit, row, first + tl.program_id(0), stream, k0, k1)
    for word in tl.static_range(4):
        tl.store(at + (tl.program_id(0) * 4 + word) * ROWS * UNITS, drawn[word].to(tl.int64))


@triton.jit
def draw_family(seed, words, FAMILY: tl.constexpr, stream, threshold, below, ROWS: tl.constexpr, UNITS: tl.constexpr):
    unit, row = tl.arange(0, UNITS)[None, :], tl.arange(0, ROWS)[:, None]
    k0, k1 = jit_masks.load_key(seed)
    at = row * UNITS + unit
    drawn = jit_masks.family_words(unit, row, FAMILY, stream, k0, k1)
    for word in tl.static_range(4):
        tl.store(words + at + word * ROWS * UNITS, drawn[word].to(tl.int64))
    tl.store(below + at, jit_masks.is_below(drawn[0], threshold))


@triton.jit
def draw_groups(seed, words, position, stream, rows, group_rows, ROWS: tl.constexpr, UNITS: tl.constexpr):
    unit, row = tl.arange(0, UNITS)[None, :], tl.arange(0, ROWS)[:, None]
    k0, k1, counted, first_step = jit_masks.row_key(row, seed, rows, group_rows, True)
    at = words + row * UNITS + unit
    drawn = jit_masks.step_words(unit, counted, position + first_step, stream, k0, k1)
    family = jit_masks.family_words(unit, counted, jit_masks.SEQUENCE, stream, k0, k1)
    for word in tl.static_range(4):
        tl.store(at + word * ROWS * UNITS, drawn[word].to(tl.int64), mask=row < rows)
        tl.store(at + (4 + word) * ROWS * UNITS, family[word].to(tl.int64), mask=row < rows)


@triton.jit
def activate(values, sigmoids, tanhs, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    value = tl.load(values + at)
    tl.store(sigmoids + at, jit_cell.sigmoid(value))
    tl.store(tanhs + at, jit_cell.tanh(value))


@triton.jit
def keep(values, kept, back, IS_TANH: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    fixed = jit_storage.keep_activation(tl.load(values + at), IS_TANH, True)
    tl.store(kept + at, fixed)
    tl.store(back + at, jit_storage.kept_activation(fixed, IS_TANH, True))


@triton.jit
def add_pieces(pieces, total, SPLIT: tl.constexpr):
    piece, row, unit = (
        tl.arange(0, SPLIT)[:, None, None],
        tl.arange(0, 4)[None, :, None],
        tl.arange(0, 8)[None, None, :],
    )
    summed = jit_storage.sum_of_pieces(tl.load(pieces + piece * 32 + row * 8 + unit), SPLIT)
    tl.store(total + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :], summed)


@triton.jit
def narrow(values, narrowed, STORAGE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(narrowed + at, jit_storage.narrow(tl.load(values + at), STORAGE))


@triton.jit
def multiply(left, right, result, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    zero = tl.zeros((SIZE, SIZE), tl.float32)
    tl.store(result + at, jit_storage.dot(tl.load(left + at), tl.load(right + at), zero, "ieee"))


@triton.jit
def step(z, states, masks, grads, results, COUNT: tl.constexpr):
    """One cell there and back, without a norm: rows of ``results`` are h, c, dz (4), dh_prev, dc_prev."""
    at = tl.arange(0, COUNT)
    previous_hidden, previous_cell = tl.load(states + at), tl.load(states + COUNT + at)
    update, cell = tl.load(masks + at), tl.load(masks + COUNT + at)
    zone_hidden, zone_cell = tl.load(masks + 2 * COUNT + at), tl.load(masks + 3 * COUNT + at)
    i, f, g, o, candidate = jit_cell.begin_cell(
        tl.load(z + at),
        tl.load(z + COUNT + at),
        tl.load(z + 2 * COUNT + at),
        tl.load(z + 3 * COUNT + at),
        previous_cell,
        update,
        cell,
    )
    h, c, _ = jit_cell.finish_cell(candidate, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell)
    grad_previous_hidden, grad_hidden = jit_cell.through_zone(zone_hidden, tl.load(grads + at))
    grad_previous_cell, grad_candidate = jit_cell.through_zone(zone_cell, tl.load(grads + COUNT + at))
    grad_argument, grad_o = jit_cell.leave_output(candidate, o, grad_hidden)
    dz_i, dz_f, dz_g, dz_o, through_forget = jit_cell.leave_cell(
        i, f, g, o, previous_cell, update, cell, grad_candidate + grad_argument, grad_o
    )
    tl.store(results + at, h)
    tl.store(results + COUNT + at, c)
    tl.store(results + 2 * COUNT + at, dz_i)
    tl.store(results + 3 * COUNT + at, dz_f)
    tl.store(results + 4 * COUNT + at, dz_g)
    tl.store(results + 5 * COUNT + at, dz_o)
    tl.store(results + 6 * COUNT + at, grad_previous_hidden)
    tl.store(results + 7 * COUNT + at, grad_previous_cell + through_forget)


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -0x0123456789ABCDEF]


@pytest.mark.parametrize("seed", SEEDS)
def test_step_masks_are_the_contract_bit_for_bit(seed: int) -> None:
    words = torch.zeros(3, 4, 4, 8, dtype=torch.int64)
    draw_steps[(3,)](torch.tensor(seed), words, 5, 7, ROWS=4, UNITS=8)
    expected = mask_contract.MaskSource(torch.tensor(seed), layer=3, direction=1).step(5, 3, 4, 8)
    assert torch.equal(words.transpose(0, 1), torch.stack(expected))


@pytest.mark.parametrize("name", ["SEQUENCE", "UNTIED_HIDDEN", "INPUT", "UNTIED_INPUT"])
@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.25, 0.5, 0.999999999])
def test_families_and_thresholds_are_the_contract_bit_for_bit(name: str, rate: float) -> None:
    seed = torch.tensor(-77)
    words, below = torch.zeros(4, 4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.bool)
    draw_family[(1,)](seed, words, getattr(jit_masks, name).value, 2, jit_masks.threshold(rate), below, ROWS=4, UNITS=8)
    expected = mask_contract.MaskSource(seed, 1, 0).sequence(4, 8, getattr(mask_contract, name))
    assert torch.equal(words, torch.stack(expected))
    assert torch.equal(below, expected[0] < mask_contract.threshold(rate))


def test_groups_of_rows_draw_the_contracts_bits() -> None:
    seeds = torch.tensor([[5, 0], [-(2**63), 7], [2**40 + 3, 2**32 - 2]])
    words = torch.zeros(2, 4, 8, 8, dtype=torch.int64)
    draw_groups[(1,)](seeds, words, 1, 3, 6, 2, ROWS=8, UNITS=8)
    source = mask_contract.MaskSource(seeds, layer=1, direction=1)
    assert torch.equal(words[0, :, :6], torch.stack(source.step(1, 1, 6, 8))[:, 0])
    assert torch.equal(words[1, :, :6], torch.stack(source.sequence(6, 8)))


def test_weight_masks_are_the_contract_bit_for_bit() -> None:
    seed = torch.tensor(12345)
    words, below = torch.zeros(4, 4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.bool)
    draw_family[(1,)](seed, words, jit_masks.WEIGHT.value, 5, jit_masks.threshold(0.5), below, ROWS=4, UNITS=8)
    source = mask_contract.MaskSource(seed, 2, 1)
    assert torch.equal(words.permute(1, 2, 0).reshape(4, 32), source.weight(4, 32))
    assert torch.equal(words[0, :, :1], source.weight_row(4))


def test_transcendentals_are_exact_at_any_argument() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.randn(1024, generator=generator) * scale for scale in (3.0, 0.5, 0.05, 1e-4, 1e-8, 1e-30, 30.0)]
        + [torch.linspace(-85, 85, 1024)]
    ).clamp(-87, 87)
    sigmoids, tanhs = torch.zeros_like(values), torch.zeros_like(values)
    activate[(1,)](values, sigmoids, tanhs, COUNT=len(values))
    for got, exact in ((sigmoids, torch.sigmoid(values.double())), (tanhs, torch.tanh(values.double()))):
        units = (got.double() - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)
        assert units.max() <= 4 * torch.finfo(torch.float32).eps


def test_transcendentals_at_the_ends() -> None:
    values = torch.tensor([0.0, -0.0, 1e3, -1e3, 1e38, -1e38, float("inf"), float("-inf"), float("nan"), 88, -88, 104])
    values = torch.cat([values, values.new_zeros(4)])
    sigmoids, tanhs = torch.zeros_like(values), torch.zeros_like(values)
    activate[(1,)](values, sigmoids, tanhs, COUNT=len(values))
    torch.testing.assert_close(sigmoids, torch.sigmoid(values), equal_nan=True, rtol=1e-6, atol=2e-38)
    torch.testing.assert_close(tanhs, torch.tanh(values), equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_tanh", [False, True])
def test_kept_gates_are_the_cpu_kernels_fixed_point(is_tanh: bool) -> None:
    values = torch.linspace(-1 if is_tanh else 0, 1, 1024)
    values[17] = float("nan")
    kept, back = torch.zeros(1024, dtype=torch.int16), torch.zeros(1024)
    keep[(1,)](values, kept, back, IS_TANH=is_tanh, COUNT=1024)
    scale, offset = (32767.0, 0.0) if is_tanh else (65534.0, 0.5)
    expected = torch.round((values.double() - offset) * scale).nan_to_num(-32768)
    assert (kept - expected).abs().max() <= 1  # a tie may go either way
    assert kept[17] == -32768
    assert torch.isnan(back[17])
    torch.testing.assert_close(back, values, rtol=0, atol=2e-5 if is_tanh else 1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    values[:64] = torch.arange(64) / 64 * 2**-7 + 1  # ties among them
    values[64:67] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    narrowed = torch.zeros(1024, dtype=dtype)
    narrow[(1,)](values, narrowed, STORAGE=getattr(tl, str(dtype)[6:]), COUNT=1024)
    torch.testing.assert_close(narrowed, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_tiles(dtype: torch.dtype) -> None:
    left, right = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    result = torch.zeros(16, 16)
    multiply[(1,)](left, right, result, SIZE=16)
    torch.testing.assert_close(result, left.float() @ right.float())


@pytest.mark.parametrize("split", [2, 4, 8])
def test_the_pieces_of_a_split_product_add_up(split: int) -> None:
    pieces = torch.randint(-9, 9, (split, 4, 8)).float()  # whole numbers: exact in any order
    total = torch.empty(4, 8)
    add_pieces[(1,)](pieces, total, split)
    assert torch.equal(total, pieces.sum(0))


@pytest.mark.parametrize("zones", ["mask", "rate"])
def test_the_cell_there_and_back_is_the_references(zones: str) -> None:
    """Against the reference with an input of z itself and W_hh of zero, so that the pre-activations are given."""
    count, rate = 16, 0.3
    training = zones == "mask"
    options = LayerOptions(
        training=training, zoneout_hidden=rate, zoneout_cell=rate, update_dropout=rate, cell_dropout=rate
    )
    generator, seed = torch.Generator().manual_seed(3), torch.tensor(5)
    z = torch.randn(1, 1, 4 * count, generator=generator, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 1, count, generator=generator, dtype=torch.float64)
    hidden, cell = (each.clone().requires_grad_() for each in state)
    parameters = LayerParameters(
        torch.eye(4 * count, dtype=torch.float64), torch.zeros(4 * count, count, dtype=torch.float64)
    )
    result = reference.lstm_layer(z, hidden, cell, parameters, options, seed=seed)
    grads = torch.randn(2, count, generator=generator, dtype=torch.float64)
    dz, dh, dc = torch.autograd.grad(
        [result.final_hidden, result.final_cell], [z, hidden, cell], [grads[:1], grads[1:]]
    )

    drawn = mask_contract.layer_masks(
        seed, options, steps=1, rows=1, input_size=4 * count, hidden_size=count, output_size=count
    )
    shape: Callable[[Any], torch.Tensor] = lambda mask: mask.reshape(count).float()  # noqa: E731
    if training:
        masks = torch.stack(
            [
                1 - shape(drawn.update_dropout),
                1 - shape(drawn.cell_dropout),
                shape(drawn.zoneout_hidden),
                shape(drawn.zoneout_cell),
            ]
        )
        masks[0] /= 1 - rate
    else:
        masks = torch.tensor([1.0, 1 - rate, rate, rate]).unsqueeze(1).expand(4, count).contiguous()
    results = torch.zeros(8, count)
    step[(1,)](z.detach().float().contiguous(), state.float(), masks, grads.float(), results, COUNT=count)
    expected = torch.cat(
        [result.final_hidden.detach(), result.final_cell.detach(), dz.reshape(4, count), dh, dc]
    ).float()
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


def test_a_zoned_out_nan_does_not_leak() -> None:
    count = 4
    z = torch.full((4, count), float("nan"))
    masks = torch.ones(4, count)
    results = torch.zeros(8, count)
    step[(1,)](z, torch.ones(2, count), masks, torch.ones(2, count), results, COUNT=count)
    assert torch.equal(results[0], torch.ones(count))
    assert torch.equal(results[1], torch.ones(count))
    assert torch.equal(results[6], torch.ones(count))
