"""What is compared with what, at which sizes and for how long: the presets of :mod:`benchmarks.run`.

Nothing in this file runs anything; the tests check it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.registry import (
    ALL,
    ALL_NORM,
    BATCH_NORM,
    CALL_CASES,
    CASES,
    COMPILED_ALL,
    EAGER_ALL,
    EAGER_ALL_NORM,
    EAGER_PLAIN,
    PLAIN,
    SINGLE,
    TIERS,
    TORCH,
    TORCHRL,
    TRITON_ALL,
    TRITON_ALL_NORM,
    TRITON_PLAIN,
    Case,
    Mode,
    Size,
    Variant,
)


@dataclass(frozen=True)
class Comparison:
    """``variant`` timed beside ``against``, in alternation; the ratio is ``variant``'s time over ``against``'s."""

    variant: Variant
    against: Variant
    mode: Mode

    @property
    def name(self) -> str:
        """For example ``all / nn.LSTM, training``."""
        return f"{self.variant.name} / {self.against.name}, {self.mode}"


QUICK: tuple[Comparison, ...] = (
    Comparison(PLAIN, TORCH, "inference"),
    Comparison(PLAIN, TORCH, "training"),
    Comparison(ALL, TORCH, "training"),
    Comparison(ALL_NORM, TORCH, "training"),
    Comparison(EAGER_ALL, ALL, "training"),
)
FULL: tuple[Comparison, ...] = (
    *QUICK,
    *(Comparison(variant, TORCH, "training") for variant in SINGLE),
    Comparison(EAGER_PLAIN, PLAIN, "training"),
    Comparison(EAGER_ALL_NORM, ALL_NORM, "training"),
)
TRITON: tuple[Comparison, ...] = (
    Comparison(TRITON_PLAIN, TORCH, "inference"),
    Comparison(TRITON_PLAIN, TORCH, "training"),
    Comparison(TRITON_ALL, TORCH, "training"),
    Comparison(TRITON_ALL_NORM, TORCH, "training"),
)
GPU_QUICK: tuple[Comparison, ...] = (
    *QUICK,
    Comparison(ALL, TORCH, "inference"),
    Comparison(ALL, PLAIN, "training"),
    Comparison(BATCH_NORM, PLAIN, "training"),
    *TRITON,
    Comparison(TRITON_PLAIN, TORCHRL, "training"),
)
GPU: tuple[Comparison, ...] = (
    *GPU_QUICK,
    *(one for one in FULL if one not in QUICK),
    Comparison(COMPILED_ALL, ALL, "training"),
)
SWEEP: tuple[Comparison, ...] = (
    Comparison(PLAIN, TORCH, "inference"),
    Comparison(ALL, TORCH, "training"),
    Comparison(TRITON_ALL, TORCH, "training"),
    *(Comparison(tier, ALL, "training") for tier in TIERS),
)

# What each regulariser costs: beside this library without it. Dropout between layers needs two of them.
REGULARIZERS: tuple[Comparison, ...] = tuple(Comparison(variant, PLAIN, "training") for variant in (*SINGLE, ALL))
REGULARIZER_CASES: tuple[Case, ...] = tuple(
    case for case in CASES if case.name in ("small", "flashrnn", "zaremba-large")
)


CALLS: tuple[Comparison, ...] = (Comparison(PLAIN, TORCH, "inference"), Comparison(PLAIN, TORCH, "training"))

# ``(T, B, H)`` of the loop alone: sizes that are bound by arithmetic, from a weight of 4 MB to one of 16 MB.
LOOP_SIZES: tuple[tuple[int, int, int], ...] = ((64, 32, 512), (64, 64, 512), (32, 64, 1024))


# Persistent kernels of cuDNN are float16's alone at most sizes; what float32 means is in benchmarks.ceilings.
GPU_DTYPES = ("float16", "bfloat16", "tf32", "float32")

SWEEP_HIDDEN = (64, 128, 256, 512, 768, 1024, 1536, 2048, 4096)
SWEEP_ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
SWEEP_STEPS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def _sweep(steps: int, rows: int, hidden_size: int) -> Case:
    name = f"T{steps}-B{rows}-H{hidden_size}"
    return Case(name, "a point of the sweep over sizes", steps, rows, hidden_size, hidden_size)


# A grid over H and B, from which the tier of a shape is set, and a line over T.
SWEEP_CASES: tuple[Case, ...] = (
    *(_sweep(128, rows, hidden_size) for hidden_size in SWEEP_HIDDEN for rows in SWEEP_ROWS),
    *(_sweep(steps, 32, 512) for steps in SWEEP_STEPS),
)


@dataclass(frozen=True)
class Preset:
    """Which comparisons are made, at which sizes, and for how long.

    Every comparison takes at least ``minimum_rounds`` pairs, then more while the case's ``seconds`` last.
    ``backend`` is fusedreg's; ``""`` is the one that is named as the device. ``character_model``: end with it.
    ``check_width``: above this many units a regularised layer is checked at a smaller width (``None``: never).
    ``loop_sizes``: ``(T, B, H)`` at which the loop alone is timed. ``cases``: what is run where no case is named.
    ``threads``: of torch and of the kernels; ``None``: torch's own choice.
    """

    name: str
    device: str
    size: Size
    comparisons: tuple[Comparison, ...]
    dtypes: tuple[str, ...] = ("float32",)
    seconds: float = 7.0
    minimum_rounds: int = 3
    maximum_rounds: int = 31
    sample_seconds: float = 0.02
    memory: bool = True
    backend: str = ""
    character_model: bool = False
    check_width: int | None = None
    loop_sizes: tuple[tuple[int, int, int], ...] = ()
    cases: tuple[Case, ...] = CASES
    threads: int | None = None


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("cpu", "cpu", "short", QUICK, seconds=5.0, character_model=True, check_width=256, loop_sizes=LOOP_SIZES),
        Preset("cpu-full", "cpu", "short", FULL, seconds=90.0, minimum_rounds=7, loop_sizes=LOOP_SIZES),
        Preset(
            "cpu-regularizers",
            "cpu",
            "short",
            REGULARIZERS,
            seconds=75.0,
            minimum_rounds=7,
            memory=False,
            check_width=256,
            cases=REGULARIZER_CASES,
        ),
        Preset(
            "cpu-calls",
            "cpu",
            "full",
            CALLS,
            seconds=20.0,
            minimum_rounds=31,
            maximum_rounds=201,
            memory=False,
            cases=CALL_CASES,
            threads=1,
        ),
        Preset("gpu", "cuda", "full", GPU, GPU_DTYPES, seconds=10.0, minimum_rounds=5, check_width=256),
        Preset("gpu-quick", "cuda", "full", GPU_QUICK, GPU_DTYPES[:2], seconds=2.0, check_width=256),
        Preset(
            "gpu-sweep",
            "cuda",
            "full",
            SWEEP,
            ("bfloat16",),
            seconds=1.0,
            sample_seconds=0.01,
            memory=False,
            check_width=256,
            cases=SWEEP_CASES,
        ),
        Preset(
            "tiny", "cpu", "tiny", QUICK, seconds=0.0, minimum_rounds=2, sample_seconds=0.0, loop_sizes=((4, 32, 64),)
        ),
    )
}


def select_cases(names: str | None, cases: Sequence[Case] = CASES) -> list[Case]:
    """The cases named in a comma-separated list, in which ``*`` stands for anything, or all of them.

    Raises ``ValueError`` for a name that fits none, with the known ones.
    """
    if not names:
        return list(cases)
    chosen: dict[str, Case] = {}
    for pattern in (name.strip() for name in names.split(",") if name.strip()):
        found = {case.name: case for case in cases if fnmatch.fnmatchcase(case.name, pattern)}
        if not found:
            raise ValueError(f"unknown case {pattern!r}: expected some of {', '.join(case.name for case in cases)}")
        chosen |= found
    return list(chosen.values())
