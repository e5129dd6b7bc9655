"""Triton's kernels with ``proj_size`` and with probes, under the interpreter: results and gradients in the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_support  # noqa: F401  # before the kernels
from test_triton_backward import case_of, check, use_kernels
from triton_switching import switching_programs

import fusedreg
from fusedreg.backends.triton import backward_configuration, configurations
from fusedreg.backends.triton.layout import make_layer
from fusedreg.encoding import SAVE_GATES, encode_options
from fusedreg.testing import make_arguments


@pytest.mark.parametrize(
    ("name", "mode", "changes"),
    [
        ("none", "reverse", {}),
        ("everything", "ragged", {}),
        ("everything", "evaluation", {"probes": True}),
        ("everything_untied", "recompute", {"probes": True}),
        ("zoneout_candidate", "ragged", {"probes": True}),
        ("everything_batch_norm", "reverse", {"probes": True}),
        ("everything_layer_norm", "reverse", {"probes": True}),
        ("batch_norm_cell", "evaluation", {}),
        # Several tiles of rows, of units and of projected units.
        ("everything_untied", "reverse", {"rows": 18, "hidden_size": 37, "proj_size": 19, "steps": 2}),
    ],
)
def test_projection(name: str, mode: str, changes: dict[str, object]) -> None:
    check(case_of(name, mode, **{"proj_size": 4, **changes}))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("everything_untied", torch.bfloat16),
        ("everything_batch_norm", torch.bfloat16),
        ("everything_layer_norm", torch.bfloat16),
        ("everything", torch.float16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_projection_in_16_bit_types(name: str, dtype: torch.dtype) -> None:
    check(case_of(name, dtype=dtype, proj_size=4, probes=True))


def test_no_persistent_kernel_and_why() -> None:
    case = replace(case_of("everything"), proj_size=4)
    layer = make_layer((*make_arguments(case, 0).tensors(), *encode_options(case.options, SAVE_GATES)))
    assert not configurations.forward_configuration(layer).block.persistent
    assert not backward_configuration.backward_configuration(layer, activated=True).block.persistent
    for ask in (
        lambda: configurations.forward_configuration(layer, persistent=True),
        lambda: backward_configuration.backward_configuration(layer, activated=True, persistent=True),
    ):
        with pytest.raises(ValueError, match="proj_size=4"):
            ask()


def test_the_module_takes_it() -> None:
    torch.manual_seed(0)
    ours = fusedreg.LSTM(3, 8, 2, proj_size=5, zoneout_hidden=0.3, bidirectional=True, backend="triton")
    right = fusedreg.LSTM(3, 8, 2, proj_size=5, zoneout_hidden=0.3, bidirectional=True, backend="reference")
    right.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 3)
    results = [module(x, seed=3) for module in (ours, right)]
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0].shape == (3, 2, 10)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("none", "recompute"),
        ("everything", "reverse"),
        ("candidate_dropped", "ragged"),
        ("zoneout_candidate", "ragged"),
        ("everything_batch_norm", "ragged"),
        ("everything_layer_norm", "reverse"),
        ("batch_norm", "evaluation"),
    ],
)
def test_probes(name: str, mode: str) -> None:
    check(case_of(name, mode, probes=True))


@pytest.mark.parametrize("name", ["everything", "everything_layer_norm"])
def test_probes_in_the_persistent_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, persistent=True, programs=3)
    case = case_of(name, probes=True, hidden_size=20)
    with switching_programs(seed=5) as used:
        check(case)
    assert used.largest_grid == 3
