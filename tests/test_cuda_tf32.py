"""TF32 in the persistent tiers, on the emulated device: taken in both directions where torch allows it, and only there.

The emulated matrix instruction rounds as the hardware's does. The library's products around the loop are the CPU's, in
full precision here, so the error is the loop's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from emulated_cuda import emulated, lstm_layer, use
from test_parity import case_of

from fusedreg.testing import budget, implementation, make_arguments, relative_error, run_layer

pytestmark = emulated


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tier", ["grid", "cluster"])
@pytest.mark.parametrize("name", ["none", "everything_untied", "everything_layer_norm", "everything_batch_norm"])
def test_error_of_tf32(name: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name, "reverse", steps=6, rows=20, hidden_size=45, resets=True)
    arguments = make_arguments(case, 3)
    exact = run_layer(implementation("reference"), case, arguments.to(torch.float64))
    with use(tier):
        true = run_layer(lstm_layer, case, arguments)
        monkeypatch.setattr(budget, "true_float32", lambda: precision("high"))
        allowed = run_layer(lstm_layer, case, arguments)
    for key, value in exact.items():
        if key == "input_statistics":
            continue  # made before the loop
        assert relative_error([(true[key].double(), value)]) < 5e-6, key
        assert relative_error([(allowed[key].double(), value)]) < 1e-3, key
    for key in ("output", "grad initial_hidden"):  # forward and backward
        assert relative_error([(allowed[key].double(), exact[key])]) > 1e-5, f"{key} is not made of TF32 products"
