"""The table's rows: what a feature is called, its check, and the types it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.support import checks, compiled_checks
from benchmarks.support.places import Place

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Feature:
    """A row.

    Args:
        key: in the results file, and a test's id.
        text: in the README.
        check: of one type; raises where the feature is not there.
        together: a check of all types at once, instead.
        dtypes: the types it is about.
        only: the backends it is about, where it is not about all.
        evidence: a test file that shows it instead of a check here.
        elsewhere: the word for the backends it is not about.
    """

    key: str
    text: str
    check: Callable[[Place, torch.dtype], None] | None = None
    together: Callable[[Place, Sequence[torch.dtype]], None] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    only: tuple[str, ...] = ()
    evidence: str = ""
    elsewhere: str = "–"


FEATURES = (
    Feature("like_torch", "without regularisers: what `nn.LSTM` computes", checks.like_torch),
    Feature("rates", "all rates, masks and zoneout of the table above", checks.rates),
    Feature("batch_norm", "`BatchNorm`", checks.batch_norm),
    Feature("layer_norm", "`LayerNorm`", checks.layer_norm),
    Feature("projection", "`proj_size`", checks.projection),
    Feature("layouts", "layers, directions, `batch_first`, unbatched, `PackedSequence`", checks.layouts),
    Feature("ragged", "`lengths`, `reset`, `return_cell_states`", checks.ragged),
    Feature("cells", "`LSTMCell`", checks.cells),
    Feature("recompute", "`recompute`; the reference takes no notice of it", checks.recompute),
    Feature("twice_backward", "two backwards over one graph", checks.twice_backward),
    Feature("double_backward", "double backward; from kernels by way of the reference: slow", checks.double_backward),
    Feature("forward_mode", "forward-mode differentiation (`jvp`, `jacfwd`)", checks.forward_mode),
    Feature("per_sample", "`vmap`, per-sample gradients", checks.per_sample),
    Feature("functional", "`functional_call`, `parametrize`", checks.functional),
    Feature("checkpointing", "activation checkpointing, both kinds", checks.checkpointing),
    Feature("autocast", "autocast", checks.autocast, dtypes=NARROW),
    Feature(
        "compiling",
        "`torch.compile(fullgraph=True)`; the reference's loop is unrolled",
        together=compiled_checks.compiling,
    ),
    Feature(
        "exporting",
        "`torch.export` with a dynamic length (the reference: with its own), in evaluation",
        together=compiled_checks.exporting,
    ),
    Feature(
        "onnx",
        "ONNX export, in evaluation, of a model on a CPU",
        together=compiled_checks.onnx,
        dtypes=DTYPES[:2],
        only=("cpu", "reference"),
    ),
    Feature("refusals", "`torch.jit.script`, dynamic quantisation", together=compiled_checks.refusals),
    Feature(
        "distributed",
        "`DistributedDataParallel`, FSDP2 (`fully_shard`)",
        only=("cpu",),
        evidence="tests/test_distributed.py",
    ),
    Feature(
        "process_group",
        "`BatchNorm(process_group=...)`: statistics over ranks, a collective a step",
        only=("reference",),
        evidence="tests/test_distributed.py",
        elsewhere="no",
    ),
)
BY_KEY = {feature.key: feature for feature in FEATURES}
