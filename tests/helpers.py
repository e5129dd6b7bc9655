"""What several test files share: the regularisers by name, and the compiled backend's availability."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from fusedreg.backends import availability
from fusedreg.backends.cpu import instruction_sets
from fusedreg.regularization import BatchNorm, LayerNorm, Regularization

BATCH_NORMS = {
    "batch_norm": BatchNorm(max_steps=5),
    "batch_norm_input": BatchNorm(max_steps=5, recurrent=False, cell=False),
    "batch_norm_recurrent": BatchNorm(max_steps=5, input=False, cell=False),
    "batch_norm_cell": BatchNorm(max_steps=5, input=False, recurrent=False),
    "batch_norm_terms": BatchNorm(max_steps=5, cell=False, eps=1e-3),
    "batch_norm_sequence": BatchNorm(max_steps=5, input_statistics="sequence"),
    "batch_norm_shared": BatchNorm(statistics="shared"),
    "batch_norm_sequence_input": BatchNorm(
        statistics="shared", input_statistics="sequence", recurrent=False, cell=False
    ),
}
LAYER_NORMS = {
    "layer_norm": LayerNorm(),
    "layer_norm_input": LayerNorm(recurrent=False, cell=False),
    "layer_norm_recurrent": LayerNorm(input=False, cell=False),
    "layer_norm_cell": LayerNorm(input=False, recurrent=False),
    "layer_norm_terms": LayerNorm(cell=False, eps=1e-2),
}

TIED = Regularization(
    dropout=0.2,
    input_dropout=0.3,
    hidden_dropout=0.25,
    output_dropout=0.15,
    update_dropout=0.2,
    cell_dropout=0.1,
    weight_dropout=0.3,
    zoneout_hidden=0.15,
    zoneout_cell=0.4,
)
UNTIED = Regularization(
    dropout=0.1,
    input_dropout=0.2,
    hidden_dropout=0.4,
    output_dropout=0.3,
    update_dropout=0.35,
    cell_dropout=0.05,
    weight_dropout=0.5,
    zoneout_hidden=0.3,
    zoneout_cell=0.2,
    gate_masks="untied",
    update_mask="sequence",
    weight_mask="row",
    zoneout_output="candidate",
)


def _with_norm(regularization: Regularization, norm: BatchNorm | LayerNorm) -> Regularization:
    return Regularization(**{**regularization.changed(), "norm": norm})  # type: ignore[arg-type]


REGULARIZERS: dict[str, Regularization] = {
    "none": Regularization(),
    "dropout": Regularization(dropout=0.3),
    "input": Regularization(input_dropout=0.4),
    "input_untied": Regularization(input_dropout=0.4, gate_masks="untied"),
    "hidden": Regularization(hidden_dropout=0.4),
    "hidden_untied": Regularization(hidden_dropout=0.4, gate_masks="untied"),
    "output": Regularization(output_dropout=0.3),
    "update": Regularization(update_dropout=0.4),
    "update_sequence": Regularization(update_dropout=0.4, update_mask="sequence"),
    "cell": Regularization(cell_dropout=0.2),
    "weight": Regularization(weight_dropout=0.4),
    "weight_row": Regularization(weight_dropout=0.4, weight_mask="row"),
    "zoneout_hidden": Regularization(zoneout_hidden=0.3),
    "zoneout_cell": Regularization(zoneout_cell=0.4),
    "zoneout_candidate": Regularization(zoneout_hidden=0.3, zoneout_cell=0.4, zoneout_output="candidate"),
    "candidate_dropped": Regularization(
        zoneout_hidden=0.3, zoneout_output="candidate", output_dropout=0.3, dropout=0.2
    ),
    "everything": TIED,
    "everything_untied": UNTIED,
    **{name: Regularization(norm=norm) for name, norm in {**BATCH_NORMS, **LAYER_NORMS}.items()},
    "everything_batch_norm": _with_norm(TIED, BatchNorm(max_steps=5)),
    "everything_untied_batch_norm": _with_norm(UNTIED, BatchNorm(max_steps=5, input_statistics="sequence")),
    "everything_layer_norm": _with_norm(UNTIED, LayerNorm()),
    "everything_tied_layer_norm": _with_norm(TIED, LayerNorm()),
}


# Marks a test, or one of its parameters, that needs the compiled kernels.
compiled = pytest.mark.skipif(
    not availability("cpu"), reason=f"not run: the compiled backend cannot be used: {availability('cpu').reason}"
)


INSTRUCTION_SETS = ("avx512", "avx2", "portable")


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[str | None]:
    """Run kernels compiled for ``name`` in the block; yields why that is impossible here, or ``None``."""
    usable = instruction_sets()
    if not torch.ops.fusedreg._set_cpu_instruction_set(name):
        yield f"this processor or this build has no {name}, only {', '.join(usable)}"
        return
    try:
        yield None
    finally:
        torch.ops.fusedreg._set_cpu_instruction_set(usable[0])
