"""What Triton's backend does at the edges: sizes beyond 32 bits, wide grids, odd addresses, and ROCm, pretended."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from test_triton_backward import case_of

from fusedreg.backends.triton import before_loop, configurations, layer
from fusedreg.backends.triton.backward_configuration import backward_configuration
from fusedreg.backends.triton.checks import check_arguments
from fusedreg.backends.triton.layout import Arguments, aligned, make_layer
from fusedreg.encoding import (
    DIFFERENTIABLE,
    NUMBER_OF_TENSORS,
    SAVE_GATES,
    SAVE_RECOMPUTE,
    encode_options,
    hidden_differs,
)
from fusedreg.testing import LayerCase, make_arguments

MOST_OF_A_SECOND_AXIS, MOST_OF_THE_FIRST = 65_535, 2**31 - 1


def arguments_of(steps: int, rows: int, hidden_size: int) -> Arguments:
    """Without values: an input and the weights alone."""
    shapes = ((steps, rows, 1), (4 * hidden_size, 1), (4 * hidden_size, hidden_size))
    given = [torch.empty(shape, device="meta") for shape in shapes]
    return Arguments(*given, *[None] * (NUMBER_OF_TENSORS - len(given)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "rows", "hidden_size", "name"),
    [(1, 1, 23_171, "4 H P"), (1, 2**21, 1024, "B H"), (2**31, 1, 1, "T")],
)
def test_sizes_beyond_32_bits_are_refused_with_what_to_do(steps: int, rows: int, hidden_size: int, name: str) -> None:
    options = [0] * 15
    with pytest.raises(RuntimeError, match=rf"expected {name} to be at most.*split the batch or the sequence"):
        check_arguments(arguments_of(steps, rows, hidden_size), [0.0] * 9, options)
    half = (max(1, steps // 2), max(1, rows // 2), min(hidden_size, 23_000))
    check_arguments(arguments_of(*half), [0.0] * 9, options)


class RecordingKernel:
    """In the place of a kernel: keeps the grids that it is launched on."""

    def __init__(self, grids: list[tuple[str, tuple[int, ...]]], name: str) -> None:
        self.grids, self.name = grids, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append((self.name, tuple(grid) if isinstance(grid, tuple) else (grid,)))
        return lambda *arguments, **options: None


def record_grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    grids: list[tuple[str, tuple[int, ...]]] = []
    package = importlib.import_module("fusedreg.backends.triton")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name in vars(importlib.import_module(module.name)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(f"{module.name}.{name}", RecordingKernel(grids, name))
    monkeypatch.setattr(layer, "launching", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(configurations, "device_limits", lambda device: configurations.Device(132, 232_448))
    return grids


def without_values(case: LayerCase, rows: int) -> list[Any]:
    """A case's tensor arguments on the meta device, with another number of rows."""
    cut = (value for value in make_arguments(replace(case, rows=3), 0).tensors())
    shape = lambda value: [rows if size == 3 else size for size in value.shape]  # noqa: E731
    return [None if value is None else torch.empty(shape(value), dtype=value.dtype, device="meta") for value in cut]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("everything", {}),
        ("everything_untied", {"proj_size": 4, "recompute": True}),
        ("everything_batch_norm", {}),
        ("everything_layer_norm", {"proj_size": 4}),
    ],
)
def test_no_grid_is_too_wide_for_any_number_of_rows(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name, hidden_size=40, input_size=6, steps=2, **changes)
    grids = record_grids(monkeypatch)
    tensors = without_values(case, 40_000_000)
    encoded = encode_options(case.options, SAVE_RECOMPUTE if case.recompute else SAVE_GATES)
    output, _, _, cells, hidden, *saved = layer.forward(*tensors, *encoded)
    carried = hidden if hidden_differs(*encoded[:2]) else output
    needed = [tensors[place] is not None for place in DIFFERENTIABLE]
    layer.backward(output, None, None, None, *tensors, cells, carried, *saved, *encoded, needed)
    assert len({kernel for kernel, _ in grids}) >= 5
    for kernel, grid in grids:
        assert grid[0] <= MOST_OF_THE_FIRST, (kernel, grid)
        assert max(grid[1:], default=1) <= MOST_OF_A_SECOND_AXIS, (kernel, grid)


def test_slices_at_odd_addresses_are_copied_and_nothing_else() -> None:
    """Triton compiles a kernel anew for an address that 16 does not divide (test_triton_compile.py)."""
    stack = torch.randn(3, 5, 7)
    assert stack.data_ptr() % 16 == 0
    assert aligned(stack) is stack
    for value in (stack[1], stack[2], stack.transpose(0, 1)):
        copy = aligned(value)
        assert copy.data_ptr() % 16 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, value)


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for AMD's GPUs, whose products do not take ``out_dtype``."""
    monkeypatch.setattr(torch.version, "hip", "6.4")

    def refusing(original: Any) -> Any:
        def product(*arguments: Any, **options: Any) -> Any:
            if "out_dtype" in options:
                raise RuntimeError("out_dtype argument is not supported for HIP")
            return original(*arguments, **options)

        return product

    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, refusing(getattr(torch, name)))


@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_products_on_rocm(shape: tuple[int, ...]) -> None:
    for device in ("meta", "cpu"):
        left = torch.randn(shape, dtype=torch.bfloat16, device=device)
        product = before_loop.wide_product(left, left.transpose(-2, -1))
        assert product.dtype == torch.float32
        assert product.shape == (*shape[:-1], shape[-2])
    torch.testing.assert_close(product, left.float() @ left.float().transpose(-2, -1))


@pytest.mark.usefixtures("rocm")
def test_tiles_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's matrix instructions take 16 columns, and TF32 in one generation alone."""
    monkeypatch.setattr(configurations, "device_limits", lambda device: configurations.Device(24, 65_536))
    monkeypatch.setattr(configurations, "allows_tf32", lambda: True)
    assert configurations.product_precision(torch.float32) == "ieee"
    for name in ("none", "batch_norm", "layer_norm"):
        for hidden_size in (5, 200, 700):
            case = case_of(name, hidden_size=hidden_size)
            made = make_layer((*without_values(case, 8), *encode_options(case.options, SAVE_GATES)))
            for persistent in (False, True):
                assert configurations.forward_configuration(made, persistent=persistent).block.units >= 16
                assert backward_configuration(made, activated=False, persistent=persistent).block.units >= 16


@pytest.mark.parametrize("device", [(108, 163 * 1024), (132, 227 * 1024)], ids=["A100", "H200"])
def test_products_are_deep_enough_and_held_weights_fit(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product takes 16 columns at least, of each warp; beside what is held, two tiles are on their way."""
    monkeypatch.setattr(configurations, "device_limits", lambda of: configurations.Device(*device))
    monkeypatch.setattr(configurations, "allows_tf32", lambda: True)
    held = set()
    for name, dtype, hidden_size in itertools.product(
        ("none", "everything_untied"), (torch.float32, torch.bfloat16), (1, 5, 20, 100, 544, 700, 1024, 1250, 1376)
    ):
        case = case_of(name, hidden_size=hidden_size, dtype=dtype)
        copies = 4 if "untied" in name else 1
        for rows in (1, 20, 300):
            made = make_layer((*without_values(case, rows), *encode_options(case.options, SAVE_GATES)))
            forward = configurations.forward_configuration(made).block
            backward = backward_configuration(made, activated=True, persistent=True).block
            for block, depth, tiles in ((forward, hidden_size, 4), (backward, 4 * hidden_size // copies, copies)):
                assert block.columns // block.split >= 16, block
                padded = -(-depth // block.columns) * block.columns
                coming = min(2, padded // block.columns) * block.rows * block.columns
                coming *= copies if block is forward else 1
                if block.resident:
                    held.add((block is forward, dtype))
                    assert (tiles * block.units * padded + coming) * dtype.itemsize <= device[1], (hidden_size, block)
    assert len(held) == 4
