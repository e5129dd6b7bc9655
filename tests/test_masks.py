"""The counter contract: known answers, the table read element by element, rates, and independence of sites."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedreg.layer import LayerOptions
from fusedreg.masks import LayerMasks, layer_masks, masks, philox4x32_10, threshold
from fusedreg.regularization import Regularization

WORD = 2**32


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as Salmon et al. write it, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % WORD, (first >> 32) ^ c[3] ^ k[1], first % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return tuple(c)


def word(seed: int, counter: tuple[int, ...], position: int) -> int:
    seed %= 2**64
    return philox_in_integers(counter, (seed % WORD, seed >> 32))[position]


KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    words = [int(part, 16) for part in counter.split()]
    keys = [int(part, 16) for part in key.split()]
    tensors = philox4x32_10(
        (torch.tensor(words[0]), torch.tensor(words[1]), torch.tensor(words[2]), torch.tensor(words[3])),
        (torch.tensor(keys[0]), torch.tensor(keys[1])),
    )
    assert " ".join(f"{int(value):08x}" for value in tensors) == answer
    assert " ".join(f"{value:08x}" for value in philox_in_integers(tuple(words), (keys[0], keys[1]))) == answer


def test_random_counters_against_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, WORD, (6, 50), generator=generator)
    words = torch.stack(philox4x32_10((values[0], values[1], values[2], values[3]), (values[4], values[5])))
    for column in range(50):
        c = [int(value) for value in values[:, column]]
        assert tuple(words[:, column].tolist()) == philox_in_integers(tuple(c[:4]), (c[4], c[5]))


def test_threshold_is_the_floor_of_the_rate_in_32_bits() -> None:
    assert threshold(0.5) == 2**31
    assert threshold(0.1) == math.floor(0.1 * 2**32) == 429496729
    assert threshold(2.0**-33) == 0
    assert threshold(math.nextafter(1.0, 0.0)) == 2**32 - 1


# Site: (options, shape of the mask, counter of an element and the word, given its indices). I=5, H=6, P=3, B=4, T=7.
SIZES: dict[str, int] = {"steps": 7, "rows": 4, "input_size": 5, "hidden_size": 6, "output_size": 3}
SEQUENCE, HIDDEN4, INPUT, INPUT4, WEIGHT = (0xFFFFFFFF - offset for offset in range(5))
UNTIED: dict[str, Any] = {"gate_masks": "untied"}
SITES: dict[str, tuple[dict[str, Any], str, tuple[int, ...], Any]] = {
    "zoneout_hidden": ({}, "zoneout_hidden", (7, 4, 3), lambda t, b, u: ((u, b, t), 0)),
    "zoneout_cell": ({}, "zoneout_cell", (7, 4, 6), lambda t, b, u: ((u, b, t), 1)),
    "update_step": ({}, "update_dropout", (7, 4, 6), lambda t, b, u: ((u, b, t), 2)),
    "dropout": ({}, "dropout", (7, 4, 3), lambda t, b, u: ((u, b, t), 3)),
    "hidden_tied": ({}, "hidden_dropout", (4, 3), lambda b, u: ((u, b, SEQUENCE), 0)),
    "cell": ({}, "cell_dropout", (4, 6), lambda b, u: ((u, b, SEQUENCE), 1)),
    "update_sequence": (
        {"update_mask": "sequence"},
        "update_dropout",
        (4, 6),
        lambda b, u: ((u, b, SEQUENCE), 2),
    ),
    "output": ({}, "output_dropout", (4, 3), lambda b, u: ((u, b, SEQUENCE), 3)),
    "hidden_untied": (UNTIED, "hidden_dropout", (4, 4, 3), lambda b, k, u: ((u, b, HIDDEN4), k)),
    "input_tied": ({}, "input_dropout", (4, 5), lambda b, u: ((u, b, INPUT), 0)),
    "input_untied": (UNTIED, "input_dropout", (4, 4, 5), lambda b, k, u: ((u, b, INPUT4), k)),
    "weight_element": ({}, "weight_dropout", (24, 3), lambda r, c: ((c // 4, r, WEIGHT), c % 4)),
    "weight_row": ({"weight_mask": "row"}, "weight_dropout", (24, 1), lambda r, c: ((0, r, WEIGHT), 0)),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("seed", "layer", "direction"), [(0, 0, 0), (2**63 - 1, 0, 1), (-(2**40) - 7, 3, 1)])
def test_every_element_is_the_table_s(site: str, seed: int, layer: int, direction: int) -> None:
    choice, field, shape, place = SITES[site]
    rate = 0.375
    options = LayerOptions(layer=layer, direction=direction, **choice, **{field: rate})
    made = layer_masks(torch.tensor(seed), options, **SIZES)
    mask = getattr(made, field)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert [name for name, value in made._asdict().items() if value is not None] == [field]
    for indices in itertools.product(*(range(size) for size in shape)):
        counter, position = place(*indices)
        expected = word(seed, (*counter, layer * 2 + direction), position) < rate * 2**32
        assert bool(mask[indices]) == expected, indices


def test_weight_columns_that_are_no_multiple_of_four() -> None:
    options = LayerOptions(weight_dropout=0.5)
    wide = layer_masks(torch.tensor(1), options, **{**SIZES, "output_size": 9}).weight_dropout
    narrow = layer_masks(torch.tensor(1), options, **{**SIZES, "output_size": 6}).weight_dropout
    assert wide is not None
    assert narrow is not None
    assert torch.equal(wide[:, :6], narrow)


def test_a_mask_does_not_depend_on_the_sizes_around_it() -> None:
    options = LayerOptions(zoneout_cell=0.5, hidden_dropout=0.5)
    small = layer_masks(torch.tensor(1), options, **SIZES)
    large = layer_masks(
        torch.tensor(1), options, steps=20, rows=9, input_size=2, hidden_size=11, output_size=11
    )  # fmt: skip
    assert small.zoneout_cell is not None
    assert large.zoneout_cell is not None
    assert torch.equal(large.zoneout_cell[:7, :4, :6], small.zoneout_cell)
    assert small.hidden_dropout is not None
    assert large.hidden_dropout is not None
    assert torch.equal(large.hidden_dropout[:4, :3], small.hidden_dropout)


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LayerOptions(zoneout_cell=0.5, dropout=0.25)
    whole = layer_masks(torch.tensor(9), options, **SIZES)
    module = importlib.import_module("fusedreg.masks")  # the package's own name `masks` is the function
    for at_once in (1, 50, 7 * 24 - 1):
        monkeypatch.setattr(module, "_WORDS_AT_ONCE", at_once)
        pieces = layer_masks(torch.tensor(9), options, **SIZES)
        assert same(whole, pieces)


def same(left: LayerMasks, right: LayerMasks) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left, right, strict=True)
    )


def test_nothing_is_drawn_where_nothing_is_active() -> None:
    assert layer_masks(None, LayerOptions(), **SIZES) == LayerMasks()
    assert layer_masks(None, LayerOptions(training=False, zoneout_cell=0.5), **SIZES) == LayerMasks()
    with pytest.raises(ValueError, match="seed: expected a 0-dimensional int64 tensor where a rate is active"):
        layer_masks(None, LayerOptions(zoneout_cell=0.5), **SIZES)


def every_site(size: int) -> dict[str, Tensor]:
    """Every site's mask at rate 1/2, from one seed, cut to ``size`` rows and units, the first step and gate."""
    result: dict[str, Tensor] = {}
    for (name, (choice, field, shape, _)), direction in itertools.product(SITES.items(), (0, 1)):
        if name == "weight_row":
            continue
        options = LayerOptions(direction=direction, **choice, **{field: 0.5})
        sizes = {"steps": 1, "rows": size, "input_size": size, "hidden_size": size, "output_size": size}
        mask = getattr(layer_masks(torch.tensor(4), options, **sizes), field)
        if "untied" in name:
            for k in range(4):
                result[f"{name}{k}_{direction}"] = mask[:, k]
        else:
            result[f"{name}_{direction}"] = (
                mask[:size] if name == "weight_element" else mask[0] if len(shape) == 3 else mask
            )
    return result


def test_sites_directions_and_gates_are_independent() -> None:
    size = 64
    drawn = torch.stack([mask.flatten().double() for mask in every_site(size).values()])
    assert drawn.shape[0] == 36
    agreement = torch.corrcoef(drawn) - torch.eye(drawn.shape[0])
    assert float(agreement.abs().max()) < 5.0 / size  # 5 standard deviations of a correlation of size² pairs


def test_rows_units_steps_and_layers_are_independent() -> None:
    options = LayerOptions(zoneout_hidden=0.5)
    sizes = {"steps": 16, "rows": 32, "input_size": 1, "hidden_size": 16, "output_size": 16}
    lower = layer_masks(torch.tensor(4), options, **sizes).zoneout_hidden
    upper = layer_masks(torch.tensor(4), replace(options, layer=1), **sizes).zoneout_hidden
    other = layer_masks(torch.tensor(5), options, **sizes).zoneout_hidden
    assert lower is not None
    assert upper is not None
    assert other is not None
    for axis in range(3):
        rows = lower.transpose(0, axis).flatten(1).double()
        agreement = torch.corrcoef(rows) - torch.eye(rows.shape[0])
        assert float(agreement.abs().max()) < 5.0 / rows.shape[1] ** 0.5, axis
    for mask in (upper, other):
        assert abs(float((lower == mask).double().mean()) - 0.5) < 5 * 0.5 / lower.numel() ** 0.5


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("site", SITES)
def test_rates(site: str, rate: float) -> None:
    choice, field, _, _ = SITES[site]
    options = LayerOptions(**choice, **{field: rate})
    sizes = {"steps": 2, "rows": 64, "input_size": 100, "hidden_size": 100, "output_size": 100}
    mask = getattr(layer_masks(torch.tensor(11), options, **sizes), field)
    deviation = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs(float(mask.double().mean()) - rate) < 5 * deviation


def test_masks_of_a_module_by_the_names_of_its_parameters() -> None:
    regularization = Regularization(
        dropout=0.5, input_dropout=[0.25, 0.5], weight_dropout=0.5, zoneout_hidden=0.5, cell_dropout=0.5
    )
    made = masks(
        7,
        regularization,
        input_size=5,
        hidden_size=6,
        batch_size=4,
        steps=7,
        num_layers=2,
        bidirectional=True,
        proj_size=3,
    )
    assert list(made) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for position, (name, own) in enumerate(made.items()):
        layer, direction = divmod(position, 2)
        expected = layer_masks(
            torch.tensor(7),
            regularization.layer_options(layer, 2, direction, training=True),
            **{**SIZES, "input_size": 5 if layer == 0 else 6},
        )
        assert same(own, expected), name
        assert (own.dropout is None) == (layer == 1)
    assert masks(torch.tensor(7), regularization, input_size=5, hidden_size=6, batch_size=0, steps=7, num_layers=2)
    with pytest.raises(ValueError, match="input_dropout: expected one number, or 3"):
        masks(0, regularization, input_size=5, hidden_size=6, batch_size=4, steps=7, num_layers=3)


def test_one_seed_per_sample_under_vmap() -> None:
    options = LayerOptions(zoneout_cell=0.5)

    def mask(seed: Tensor) -> Tensor:
        made = layer_masks(seed, options, **SIZES).zoneout_cell
        assert made is not None
        return made

    seeds = torch.tensor([3, -3, 2**62])
    assert torch.equal(torch.vmap(mask)(seeds), torch.stack([mask(seed) for seed in seeds]))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_masks_are_the_same_bits(backend: str) -> None:
    options = LayerOptions(zoneout_cell=0.5, weight_dropout=0.3)

    def draw(seed: Tensor) -> tuple[Tensor | None, Tensor | None]:
        made = layer_masks(seed, options, **SIZES)
        return made.zoneout_cell, made.weight_dropout

    compiled = torch.compile(draw, fullgraph=True, backend=backend)
    for seed in (0, -1, 2**63 - 1):
        for own, expected in zip(compiled(torch.tensor(seed)), draw(torch.tensor(seed)), strict=True):
            assert torch.equal(own, expected)
