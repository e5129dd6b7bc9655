"""Seeds: the same in eager and compiled code, per sample or common under vmap, and what the caller may pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedreg.seeds import as_seed, draw_seed, wrap_to_int64


def test_a_seed_is_one_int64_from_the_default_generator() -> None:
    torch.manual_seed(7)
    first, second = draw_seed("cpu"), draw_seed("cpu")
    torch.manual_seed(7)
    assert first.shape == ()
    assert first.dtype == torch.int64
    assert torch.equal(draw_seed("cpu"), first)
    assert torch.equal(draw_seed("cpu"), second)
    assert not torch.equal(first, second)


def test_a_generator_leaves_the_default_one_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    first = draw_seed("cpu", generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw_seed("cpu", generator=torch.Generator().manual_seed(3)), first)
    assert not torch.equal(draw_seed("cpu", generator=generator), first)


def test_ranks_seeded_alike_draw_apart_where_asked() -> None:
    def seed(rank: int) -> int:
        torch.manual_seed(0)
        return int(draw_seed("cpu", rank=rank))

    assert seed(0) == seed(0)
    assert len({seed(rank) for rank in range(100)}) == 100


@pytest.mark.compile
def test_compiled_code_draws_what_eager_code_draws() -> None:
    def two() -> tuple[Tensor, Tensor]:
        return draw_seed("cpu"), draw_seed("cpu")

    torch.manual_seed(1)
    eager = two()
    torch.manual_seed(1)
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")()
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])


def test_the_operator_passes_opcheck() -> None:
    arguments = {"device": torch.device("cpu"), "rank": 1}
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fusedreg.draw_seed.default, (), arguments, test_utils=utilities)
    assert torch.Tag.nondeterministic_seeded in torch.ops.fusedreg.draw_seed.default.tags


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)], ids=["eager", "compiled"])
def test_vmap_honours_randomness(compiled: bool) -> None:
    def sample(value: Tensor) -> Tensor:
        return value + draw_seed("cpu")

    def run(randomness: str) -> Tensor:
        function: Any = torch.vmap(sample, randomness=randomness)
        if compiled:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        result: Tensor = function(torch.zeros(4, dtype=torch.int64))
        return result

    torch.manual_seed(0)
    in_a_loop = [int(draw_seed("cpu")) for _ in range(4)]
    assert run("different").tolist() == in_a_loop
    assert run("same").tolist() == [in_a_loop[0]] * 4


def test_vmap_refuses_by_default_and_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"randomness='error'; pass randomness='different'"):
        torch.vmap(lambda value: value + draw_seed("cpu"))(torch.zeros(2))


def test_vmap_inside_vmap() -> None:
    def nested(inner: str, outer: str) -> Tensor:
        function = torch.vmap(
            torch.vmap(lambda value: value + draw_seed("cpu"), randomness=inner), randomness=outer
        )  # fmt: skip
        result: Tensor = function(torch.zeros(3, 2, dtype=torch.int64))
        return result

    assert nested("different", "different").unique().numel() == 6
    by_sample = nested("same", "different")
    assert by_sample.unique().numel() == 3
    assert torch.equal(by_sample[:, 0], by_sample[:, 1])
    common = nested("different", "same")
    assert common.unique().numel() == 2
    assert torch.equal(common[0], common[2])
    with pytest.raises(RuntimeError, match="randomness='error'"):
        nested("different", "error")


def test_ints_count_modulo_two_to_the_64() -> None:
    for value in (0, 1, -1, 2**63, 2**64 - 1, 2**64 + 5, -(2**63) - 1, 10**30):
        seed = as_seed(value, "cpu")
        assert seed.shape == ()
        assert seed.dtype == torch.int64
        assert int(seed) % 2**64 == value % 2**64
        assert wrap_to_int64(value) == int(seed)
    assert int(as_seed(np.int32(5), "cpu")) == 5


def test_a_tensor_is_taken_as_it_is() -> None:
    seed = torch.tensor(12345)
    assert torch.equal(as_seed(seed, "cpu"), seed)


@pytest.mark.parametrize(
    "seed", [1.0, "1", None, True, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)], ids=repr
)
def test_seeds_of_the_wrong_type(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed: expected"):
        as_seed(seed, "cpu")


def test_seeds_with_dimensions() -> None:
    with pytest.raises(ValueError, match=r"seed: expected a tensor without dimensions, got shape \(2,\)"):
        as_seed(torch.tensor([1, 2]), "cpu")
