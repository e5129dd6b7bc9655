"""The masks that a seed makes: Philox4x32-10 in plain torch, keyed on logical coordinates.

No backend stores a mask. Each draws it where it needs it, from a counter (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") that names the unit, the row, the step, the site, the layer and the direction, so that
every backend makes the same bits from the same seed. The table of counters::

    family         c0         c1         c2     w0                    w1            w2                      w3
    step           unit       row b      t      zoneout_hidden        zoneout_cell  update_dropout, step    dropout
    sequence       unit       row b      2³²-1  hidden_dropout, tied  cell_dropout  update_dropout, seq.    output_d.
    untied hidden  unit       row b      2³²-2  i                     f             g                       o
    input          feature    row b      2³²-3  input_dropout, tied
    untied input   feature    row b      2³²-4  i                     f             g                       o
    weight         column//4  row of 4H  2³²-5  the word is column % 4 (w0 for "row")

``c3 = layer * 2 + direction``; the key is the seed, low word first; ``t`` is the position in the input, also in the
reverse direction. An element is dropped (or zoned out) where its word is below ``floor(p * 2**32)``.

A seed of shape ``(S, 2)`` makes ``S`` groups of rows that draw as if each were a call of its own: see
:class:`MaskSource`.

All arithmetic is on int64 tensors that hold 32-bit words, on the seed's device, without synchronisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.layer import FORWARD, REVERSE, LayerOptions
from fusedreg.regularization import Regularization
from fusedreg.seeds import as_seed

SEQUENCE = 0xFFFFFFFF
UNTIED_HIDDEN = 0xFFFFFFFE
INPUT = 0xFFFFFFFD
UNTIED_INPUT = 0xFFFFFFFC
WEIGHT = 0xFFFFFFFB

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORDS_AT_ONCE = 2**20


def _multiply(word: Any, multiplier: int) -> tuple[Any, Any]:
    """High and low word of the 64-bit product of two 32-bit words, in halves so that int64 never overflows."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(counter: tuple[Any, Any, Any, Any], key: tuple[Tensor, Tensor]) -> Words:
    """Four random 32-bit words from a counter of four and a key of two (Salmon et al. 2011, ten rounds).

    Args:
        counter: four int64 tensors, or ints, with values in [0, 2**32), that broadcast together.
        key: two int64 tensors with such values, low word of the seed first.

    Returns:
        Four int64 tensors of the broadcast shape, with values in [0, 2**32).

    Example:
        >>> import torch
        >>> from fusedreg.masks import philox4x32_10
        >>> zero = torch.tensor(0)
        >>> [f"{word.item():08x}" for word in philox4x32_10((zero, 0, 0, 0), (zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    # Words broadcast as rounds mix them: after the first rounds each depends on the whole counter.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
        k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def threshold(rate: float) -> int:
    """The word below which an element is dropped: ``floor(rate * 2**32)``."""
    return math.floor(rate * 2.0**32)


class MaskSource:
    """The words of one layer and direction, family by family.

    With a seed of shape ``(S, 2)``, the ``B`` rows of a call are ``S`` groups of consecutive rows, each with a row
    ``(seed, first_step)``: its own key; counters that count its rows from 0, and steps from ``first_step``. Weights,
    which all rows share, are drawn from the first group's seed.

    Args:
        seed: 0-dimensional int64 tensor, or ``(S, 2)``.
        layer, direction: which; the direction is 0 forward, 1 reverse.
    """

    def __init__(self, seed: Tensor, layer: int, direction: int) -> None:
        self._groups = seed if seed.dim() == 2 else None
        self._key = _words_of(seed if self._groups is None else seed[0, 0])
        self._device = seed.device
        self._stream = layer * 2 + direction

    def _range(self, size: int, dim: int) -> Tensor:
        """0 … size-1 along the ``dim``-th axis from the last."""
        return torch.arange(size, device=self._device).view(-1, *[1] * dim)

    def step(self, first_step: int, steps: int, rows: int, units: int) -> Words:
        """Words ``(steps, rows, units)`` of the positions from ``first_step`` on."""
        row, key, group_step = self._rows(rows)
        position = self._range(steps, 2) + first_step + group_step
        return philox4x32_10((self._range(units, 0), row, position, self._stream), key)

    def sequence(self, rows: int, units: int, family: int = SEQUENCE) -> Words:
        """Words ``(rows, units)`` of a family that is drawn once a call."""
        row, key, _ = self._rows(rows)
        return philox4x32_10((self._range(units, 0), row, family, self._stream), key)

    def _rows(self, rows: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | int]:
        """The counter's word, the key and the first step of each row, ``(rows, 1)`` where they differ."""
        if self._groups is None:
            return self._range(rows, 1), self._key, 0
        count = self._groups.shape[0]
        each = self._groups.repeat_interleave(rows // count, 0)
        return self._range(rows // count, 1).repeat(count, 1), _words_of(each[:, :1]), each[:, 1:]

    def weight(self, rows: int, columns: int) -> Tensor:
        """One word ``(rows, columns)`` for each element of a weight."""
        quads = self._range((columns + 3) // 4, 0)
        words = philox4x32_10((quads, self._range(rows, 1), WEIGHT, self._stream), self._key)
        return torch.stack(words, -1).flatten(-2)[..., :columns]

    def weight_row(self, rows: int) -> Tensor:
        """One word ``(rows, 1)`` for each row of a weight."""
        zero = self._range(1, 0)
        return philox4x32_10((zero, self._range(rows, 1), WEIGHT, self._stream), self._key)[0]


def _words_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _WORD, (seed >> 32) & _WORD


class LayerMasks(NamedTuple):
    """What is dropped (or zoned out: ``True``) in one layer and direction; ``None`` where the rate is 0.

    By position ``t`` in the input, by row and unit: ``zoneout_hidden (T, B, P)``, ``zoneout_cell (T, B, H)``,
    ``dropout (T, B, P)``, ``update_dropout (T, B, H)``, or ``(B, H)`` with ``update_mask="sequence"``. For the whole
    sequence: ``input_dropout (B, I)`` and ``hidden_dropout (B, P)``, or ``(B, 4, ·)`` with ``gate_masks="untied"``,
    ``cell_dropout (B, H)``, ``output_dropout (B, P)``. For the whole call: ``weight_dropout (4H, P)``, or ``(4H, 1)``
    with ``weight_mask="row"``. ``P`` is ``H`` without ``proj_size``.
    """

    dropout: Tensor | None = None
    input_dropout: Tensor | None = None
    hidden_dropout: Tensor | None = None
    output_dropout: Tensor | None = None
    update_dropout: Tensor | None = None
    cell_dropout: Tensor | None = None
    weight_dropout: Tensor | None = None
    zoneout_hidden: Tensor | None = None
    zoneout_cell: Tensor | None = None


def layer_masks(
    seed: Tensor | None,
    options: LayerOptions,
    *,
    steps: int,
    rows: int,
    input_size: int,
    hidden_size: int,
    output_size: int,
) -> LayerMasks:
    """Every mask that one layer and direction draws in a call.

    Args:
        seed: 0-dimensional int64 tensor, or ``(S, 2)`` with ``S`` dividing the rows: see :class:`MaskSource`;
            ``None`` is enough where ``options.draws`` is false.
        options: the layer's; only the sites with a rate above 0 are drawn, and none in evaluation.
        steps, rows, input_size, hidden_size, output_size: ``T``, ``B``, ``I``, ``H`` and ``P``.

    Raises:
        ValueError: a mask is to be drawn and there is no seed.
    """
    if not options.draws:
        return LayerMasks()
    if seed is None:
        raise ValueError(
            "seed: expected a 0-dimensional int64 tensor where a rate is active, got None; draw_seed() one"
        )
    source = MaskSource(seed, options.layer, options.direction)
    return LayerMasks(
        **_step_masks(source, options, steps, rows, hidden_size, output_size),
        **_sequence_masks(source, options, rows, hidden_size, output_size),
        **_gate_masks(source, options, rows, input_size, output_size),
        weight_dropout=_weight_mask(source, options, 4 * hidden_size, output_size),
    )


def _below(words: Tensor, rate: float, size: int | None = None) -> Tensor:
    return words[..., :size] < threshold(rate)


def _step_masks(
    source: MaskSource, options: LayerOptions, steps: int, rows: int, hidden_size: int, output_size: int
) -> dict[str, Tensor]:
    sites = {
        "zoneout_hidden": (0, options.zoneout_hidden, output_size),
        "zoneout_cell": (1, options.zoneout_cell, hidden_size),
        "update_dropout": (2, options.update_dropout if options.update_mask == "step" else 0.0, hidden_size),
        "dropout": (3, options.dropout, output_size),
    }
    # The words take eight times the memory of their masks, and the rounds several times that: draw them in pieces.
    piece = max(1, _WORDS_AT_ONCE // max(1, rows * max(hidden_size, output_size)))
    pieces = []
    for first in range(0, steps, piece):
        draw = functools.partial(source.step, first, min(piece, steps - first), rows)
        pieces.append(_site_masks(sites, draw))
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([masks_of_piece[name] for masks_of_piece in pieces]) for name in pieces[0]}


def _sequence_masks(
    source: MaskSource, options: LayerOptions, rows: int, hidden_size: int, output_size: int
) -> dict[str, Tensor]:
    sites = {
        "hidden_dropout": (0, options.hidden_dropout if options.gate_masks == "tied" else 0.0, output_size),
        "cell_dropout": (1, options.cell_dropout, hidden_size),
        "update_dropout": (2, options.update_dropout if options.update_mask == "sequence" else 0.0, hidden_size),
        "output_dropout": (3, options.output_dropout, output_size),
    }
    return _site_masks(sites, functools.partial(source.sequence, rows))


def _site_masks(sites: dict[str, tuple[int, float, int]], draw: Callable[[int], Words]) -> dict[str, Tensor]:
    """The masks of a family's active sites, given as (word, rate, number of units), from one draw."""
    active = {name: site for name, site in sites.items() if site[1] > 0.0}
    if not active:
        return {}
    words = draw(max(size for _, _, size in active.values()))
    return {name: _below(words[word], rate, size) for name, (word, rate, size) in active.items()}


def _gate_masks(
    source: MaskSource, options: LayerOptions, rows: int, input_size: int, output_size: int
) -> dict[str, Tensor]:
    result = {}
    if options.gate_masks == "untied":
        if options.hidden_dropout > 0.0:
            words = source.sequence(rows, output_size, UNTIED_HIDDEN)
            result["hidden_dropout"] = _below(torch.stack(words, 1), options.hidden_dropout)
        if options.input_dropout > 0.0:
            words = source.sequence(rows, input_size, UNTIED_INPUT)
            result["input_dropout"] = _below(torch.stack(words, 1), options.input_dropout)
    elif options.input_dropout > 0.0:
        result["input_dropout"] = _below(source.sequence(rows, input_size, INPUT)[0], options.input_dropout)
    return result


def _weight_mask(source: MaskSource, options: LayerOptions, rows: int, columns: int) -> Tensor | None:
    if options.weight_dropout == 0.0:
        return None
    words = source.weight_row(rows) if options.weight_mask == "row" else source.weight(rows, columns)
    return _below(words, options.weight_dropout)


def masks(
    seed: int | Tensor,
    regularization: Regularization,
    *,
    input_size: int,
    hidden_size: int,
    batch_size: int,
    steps: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    proj_size: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, LayerMasks]:
    """The masks that ``seed`` makes in a training call of :class:`fusedreg.LSTM`, to look at or to test against.

    Args:
        seed: what was passed as ``seed=``: an int or a 0-dimensional int64 tensor.
        regularization: the module's options.
        input_size, hidden_size, num_layers, bidirectional, proj_size: the module's.
        batch_size, steps: ``B`` and ``T`` of the call.
        device: where to make them. Default: the seed's device, or the CPU for an int.

    Returns:
        One :class:`LayerMasks` for each layer and direction, under the suffix of its parameters: ``"l0"``,
        ``"l0_reverse"``, ``"l1"``, … A mask is ``True`` where something is dropped, or zoned out.

    Raises:
        ValueError: a sequence of rates does not have one number a layer.

    Example:
        >>> from fusedreg.masks import masks
        >>> from fusedreg.regularization import Regularization
        >>> made = masks(0, Regularization(hidden_dropout=0.5), input_size=3, hidden_size=8, batch_size=2, steps=5)
        >>> made["l0"].hidden_dropout.shape
        torch.Size([2, 8])
    """
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    seed = as_seed(seed, device)
    regularization.check_layers(num_layers)
    directions = (FORWARD, REVERSE) if bidirectional else (FORWARD,)
    output_size = proj_size or hidden_size
    result = {}
    for layer in range(num_layers):
        for direction in directions:
            result[f"l{layer}{'_reverse' if direction == REVERSE else ''}"] = layer_masks(
                seed,
                regularization.layer_options(layer, num_layers, direction, training=True),
                steps=steps,
                rows=batch_size,
                input_size=input_size if layer == 0 else output_size * len(directions),
                hidden_size=hidden_size,
                output_size=output_size,
            )
    return result
