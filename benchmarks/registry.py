"""What is measured, as data: the cases with their sources, and the variants.

Nothing in this file runs anything. :mod:`benchmarks.presets` makes comparisons of them; the tests check them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Implementation = Literal["torch", "eager", "compiled", "fusedreg", "torchrl"]
Norm = Literal["batch", "layer"]
Mode = Literal["inference", "training"]
Size = Literal["full", "short", "tiny"]


@dataclass(frozen=True)
class Case:
    """One workload: ``steps`` (T), ``batch_size`` (B), ``input_size`` (I), ``hidden_size`` (H).

    ``reset_rate`` is the chance that a row's state is zeroed before a step (episodes that end inside a batch);
    ``torch.nn.LSTM`` has no such thing and runs without. ``initial_state``: whether states are passed.
    ``short_steps`` and ``short_batch_size`` are the sizes on a CPU: long enough that what is paid once a call (packing
    the weights, the weight mask) stays a small part.
    """

    name: str
    source: str
    steps: int
    batch_size: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    reset_rate: float = 0.0
    initial_state: bool = False
    short_steps: int | None = None
    short_batch_size: int | None = None

    @property
    def directions(self) -> int:
        """2 for a bidirectional case, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of the two products of a forward pass, input product included.

        ``2 T B 4H (I + H)`` a layer and direction; a training step takes three times as many.
        """
        total = 0.0
        for layer in range(self.num_layers):
            features = self.input_size if layer == 0 else self.hidden_size * self.directions
            total += 8.0 * self.steps * self.batch_size * self.hidden_size * (features + self.hidden_size)
        return total * self.directions

    def flops(self, mode: Mode) -> float:
        """Operations of one call in ``mode``."""
        return self.forward_flops * (3.0 if mode == "training" else 1.0)

    def sized(self, size: Size) -> Case:
        """The case as published (``full``), shortened for a CPU (``short``), or for a smoke test (``tiny``)."""
        if size == "full":
            return self
        if size == "short":
            return replace(
                self, steps=self.short_steps or self.steps, batch_size=self.short_batch_size or self.batch_size
            )
        return replace(
            self,
            steps=min(self.steps, 3),
            batch_size=min(self.batch_size, 4),
            input_size=min(self.input_size, 5),
            hidden_size=min(self.hidden_size, 8),
        )


CASES: tuple[Case, ...] = (
    Case(
        "flashrnn",
        "FlashRNN's published speed comparison, Pöppel et al. 2024 (arXiv:2412.07752)",
        steps=1024,
        batch_size=16,
        input_size=768,
        hidden_size=768,
        short_steps=64,
    ),
    Case(
        "awd",
        "AWD-LSTM's middle layer on Penn Treebank, Merity et al. 2018 (arXiv:1708.02182)",
        steps=70,
        batch_size=80,
        input_size=400,
        hidden_size=1152,
        short_steps=20,
        short_batch_size=40,
    ),
    Case(
        "zaremba-large",
        "the large regularised word model, Zaremba et al. 2014 (arXiv:1409.2329)",
        steps=35,
        batch_size=20,
        input_size=1500,
        hidden_size=1500,
        num_layers=2,
        short_steps=10,
    ),
    Case(
        "speech",
        "a bidirectional acoustic encoder on 80 log-mel features, after Graves et al. 2013 (arXiv:1303.5778)",
        steps=512,
        batch_size=32,
        input_size=80,
        hidden_size=512,
        bidirectional=True,
        short_steps=64,
    ),
    Case(
        "pmnist",
        "permuted MNIST pixel by pixel, Le et al. 2015 (arXiv:1504.00941), H of Cooijmans et al. 2017",
        steps=784,
        batch_size=128,
        input_size=1,
        hidden_size=100,
        short_steps=196,
    ),
    Case(
        "rl",
        "a recurrent policy's rollouts: 128 steps and 256 units are RecurrentPPO's defaults (sb3-contrib)",
        steps=128,
        batch_size=256,
        input_size=256,
        hidden_size=256,
        reset_rate=0.01,
        short_steps=32,
    ),
    Case(
        "act",
        "the same policy choosing one action: a single step of a single row",
        steps=1,
        batch_size=1,
        input_size=256,
        hidden_size=256,
    ),
    Case(
        "stream",
        "one sequence alone, as in online prediction",
        steps=512,
        batch_size=1,
        input_size=256,
        hidden_size=256,
    ),
    Case(
        "bn-charptb",
        "character Penn Treebank with recurrent batch norm, Cooijmans et al. 2017 (arXiv:1603.09025)",
        steps=100,
        batch_size=64,
        input_size=50,
        hidden_size=1000,
        short_steps=20,
    ),
    Case(
        "small",
        "a size common in practice that fits a cache",
        steps=100,
        batch_size=64,
        input_size=256,
        hidden_size=256,
    ),
    Case(
        "large",
        "a recurrent weight that fits no cache of a core",
        steps=256,
        batch_size=64,
        input_size=2048,
        hidden_size=2048,
        short_steps=12,
        short_batch_size=32,
    ),
)

# What a call costs besides its arithmetic.
CALL_CASES: tuple[Case, ...] = tuple(
    Case(
        "tiny-states" if initial_state else "tiny",
        "a step of one row with 16 units: a small policy that chooses one action"
        + (", its states passed" if initial_state else ""),
        steps=1,
        batch_size=1,
        input_size=16,
        hidden_size=16,
        initial_state=initial_state,
    )
    for initial_state in (False, True)
)


@dataclass(frozen=True)
class Variant:
    """One way of running a case. ``rates`` are keywords of ``fusedreg.LSTM`` and of the eager loop alike.

    ``backend``: fusedreg's, instead of the run's. ``tier``: of its CUDA kernels, forced instead of chosen.
    """

    name: str
    implementation: Implementation
    rates: Mapping[str, float | str] = field(default_factory=dict)
    norm: Norm | None = None
    recompute: bool = False
    backend: str = ""
    tier: str = ""

    def impossible(self, case: Case) -> str | None:
        """Why this variant means nothing for ``case``, or ``None``."""
        if self.norm == "batch" and case.batch_size < 2:
            return "batch norm needs two rows"
        if "dropout" in self.rates and case.num_layers < 2:
            return "dropout between layers needs two layers"
        if self.implementation == "torchrl" and case.bidirectional:
            return "TorchRL's kernels run in one direction"
        return None


# The rates do not matter to the speed of any implementation here; they are in the range that papers use.
ALL_RATES: Mapping[str, float | str] = {
    "zoneout_hidden": 0.15,
    "zoneout_cell": 0.15,
    "hidden_dropout": 0.25,
    "input_dropout": 0.25,
    "weight_dropout": 0.25,
}

TORCH = Variant("nn.LSTM", "torch")
PLAIN = Variant("plain", "fusedreg")
ALL = Variant("all", "fusedreg", ALL_RATES)
ALL_NORM = Variant("all + batch norm", "fusedreg", ALL_RATES, norm="batch")
RECOMPUTE = Variant("recompute", "fusedreg", recompute=True)
EAGER_PLAIN = Variant("eager plain", "eager")
EAGER_ALL = Variant("eager all", "eager", ALL_RATES)
EAGER_ALL_NORM = Variant("eager all + batch norm", "eager", ALL_RATES, norm="batch")
COMPILED_ALL = Variant("compiled all", "compiled", ALL_RATES)
BATCH_NORM = Variant("batch norm", "fusedreg", norm="batch")
TRITON_PLAIN = Variant("triton plain", "fusedreg", backend="triton")
TRITON_ALL = Variant("triton all", "fusedreg", ALL_RATES, backend="triton")
TRITON_ALL_NORM = Variant("triton all + batch norm", "fusedreg", ALL_RATES, norm="batch", backend="triton")
TORCHRL = Variant("TorchRL's Triton LSTM", "torchrl")
# Each tier of the CUDA kernels by itself: what the choice between them is set from.
TIERS: tuple[Variant, ...] = tuple(
    Variant(f"all, {tier} tier", "fusedreg", ALL_RATES, backend="cuda", tier=tier)
    for tier in ("cluster", "grid", "step")
)

SINGLE: tuple[Variant, ...] = (
    Variant("dropout", "fusedreg", {"dropout": 0.25}),
    Variant("input_dropout", "fusedreg", {"input_dropout": 0.25}),
    Variant("input_dropout untied", "fusedreg", {"input_dropout": 0.25, "gate_masks": "untied"}),
    Variant("hidden_dropout", "fusedreg", {"hidden_dropout": 0.25}),
    Variant("hidden_dropout untied", "fusedreg", {"hidden_dropout": 0.25, "gate_masks": "untied"}),
    Variant("output_dropout", "fusedreg", {"output_dropout": 0.25}),
    Variant("update_dropout", "fusedreg", {"update_dropout": 0.25}),
    Variant("cell_dropout", "fusedreg", {"cell_dropout": 0.25}),
    Variant("weight_dropout", "fusedreg", {"weight_dropout": 0.25}),
    Variant("weight_dropout row", "fusedreg", {"weight_dropout": 0.25, "weight_mask": "row"}),
    Variant("zoneout_hidden", "fusedreg", {"zoneout_hidden": 0.15}),
    Variant("zoneout_cell", "fusedreg", {"zoneout_cell": 0.15}),
    BATCH_NORM,
    Variant("layer norm", "fusedreg", norm="layer"),
    RECOMPUTE,
)
