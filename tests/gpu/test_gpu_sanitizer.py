"""A small set for NVIDIA's compute-sanitizer, which slows kernels down by a hundred times.

Every kernel family once, forward and backward, with ragged rows and widths that are no multiple of anything. What is
computed is compared elsewhere; here it only has to be finite while memcheck and racecheck watch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_targets import Target
from test_parity import case_of

from fusedreg.testing import make_arguments, run_layer


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["none", "everything_untied", "everything_batch_norm", "everything_tied_layer_norm"])
@pytest.mark.parametrize("shape", [(3, 18, 40), (2, 33, 137)], ids=lambda shape: "T{}B{}H{}".format(*shape))
def test_under_the_sanitizer(target: Target, shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    steps, rows, hidden = shape
    sizes = {"steps": steps, "rows": rows, "input_size": 11, "hidden_size": hidden}
    case = case_of(name, "reverse", **sizes, dtype=dtype, resets=True, probes=True)
    with target.forced():
        values = run_layer(target.layer, case, make_arguments(case, 0))
        if target.tier in ("", "step"):  # the tier that has projections
            projected = replace(case, proj_size=hidden // 2)
            values |= run_layer(target.layer, projected, make_arguments(projected, 0))
    assert all(value.isfinite().all() for value in values.values())
