"""Seeds for the masks: taking one from the caller, or drawing one with torch's generator.

A seed is a 0-dimensional int64 tensor on the device that will draw the masks; only its 64 bits matter. It is drawn
through an operator of the project's own because ``torch.randint`` inside a compiled graph gives other numbers than
outside it under the same ``torch.manual_seed``; an opaque operator calls the same generator in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Any odd constant spreads ranks over the 64-bit seeds; this is the golden ratio's.
_RANK_STRIDE = 0x9E3779B97F4A7C15

# Any: torch.library has no types of its own.
_library: Any = torch.library.__dict__["Library"]("fusedreg", "FRAGMENT")
# The device by name: where a checkpointed region is compiled, torch looks for it there to keep the generator's state.
_library.define("draw_seed(*, Device device, int rank=0) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def wrap_to_int64(value: int) -> int:
    """The signed 64-bit integer with the same low 64 bits as ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def _draw(device: torch.device, rank: int = 0, generator: torch.Generator | None = None) -> Tensor:
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    # int64 addition wraps in torch, which is the modulo 2**64 wanted here.
    return seed + wrap_to_int64(rank * _RANK_STRIDE) if rank else seed


def _draw_fake(device: torch.device, rank: int = 0) -> Tensor:
    _keep_draws_apart()
    return torch.empty((), dtype=torch.int64, device=device)


def _keep_draws_apart() -> None:
    """Tell the compiler that two draws are two numbers; called whenever one is traced.

    In a graph with a backward it makes one of calls that look the same. It spares the operators of a list, and does
    not look at the tag that says the same of others. Imported here, so that only compiled code depends on it.
    """
    from torch._functorch import compile_utils

    random_operators: list[Any] = compile_utils.rand_ops
    if torch.ops.fusedreg.draw_seed not in random_operators:
        random_operators.append(torch.ops.fusedreg.draw_seed)


def _draw_under_vmap(device: torch.device, rank: int = 0) -> Tensor:
    """One seed for all samples, or one each: what ``torch.vmap(randomness=...)`` asks for.

    Registered for the key that vmap's own random operators use, since this operator has no tensor argument that
    could be batched. Torch's internals are imported here, so that only vmap depends on them.
    """
    import torch._C._functorch as functorch
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    randomness = interpreter.randomness()
    if randomness == "error":
        raise RuntimeError(
            "fusedreg: a regulariser draws random masks inside torch.vmap with randomness='error'; pass "
            "randomness='different' for masks of each sample's own, 'same' for common ones, or seed= to the layer"
        )
    batch_size, level = interpreter.batch_size(), interpreter.level()
    # As vmap's own random operators do: with this vmap's key out of the way a call reaches the next transform out.
    vmap_mode = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
    with torch._C._ExcludeDispatchKeyGuard(vmap_mode):
        if randomness == "same":
            return _call(device, rank)
        seeds = torch.stack([_call(device, rank) for _ in range(batch_size)])
    batched: Tensor = functorch._add_batch_dim(seeds, 0, level)
    return batched


_library.impl("draw_seed", _draw, "CompositeExplicitAutograd")
_library.impl("draw_seed", _draw_under_vmap, "FuncTorchVmapMode")
torch.library.register_fake("fusedreg::draw_seed", _draw_fake, lib=_library)


def _call(device: torch.device, rank: int) -> Tensor:
    seed: Tensor = torch.ops.fusedreg.draw_seed.default(device=device, rank=rank)
    return seed


def draw_seed(device: torch.device | str, *, rank: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """A new seed, from ``device``'s default generator or from ``generator``.

    Args:
        device: where the seed lives and whose generator draws it; nothing is copied to the host.
        rank: mixed into the seed. Ranks of a distributed job that are seeded alike draw alike: pass
            ``torch.distributed.get_rank()`` where each should have masks of its own.
        generator: used instead of the default one. For eager mode; in a compiled region pass ``seed=`` to the
            layer instead.

    Returns:
        A 0-dimensional int64 tensor. Inside ``torch.vmap``, one for each sample or one for all, as ``randomness=``
        says.

    Raises:
        RuntimeError: inside ``torch.vmap`` with its default, ``randomness="error"``.

    Example:
        >>> import torch
        >>> from fusedreg.seeds import draw_seed
        >>> _ = torch.manual_seed(0)
        >>> draw_seed("cpu").dtype
        torch.int64
    """
    if generator is not None:
        return _draw(torch.device(device), rank, generator)
    return _call(torch.device(device), rank)


def as_seed(seed: Any, device: torch.device | str) -> Tensor:
    """The caller's seed as the operators take it: a 0-dimensional int64 tensor on ``device``.

    Args:
        seed: an int, of which the low 64 bits count, or a 0-dimensional int64 tensor.
        device: the input's.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` is a tensor with dimensions.

    Example:
        >>> from fusedreg.seeds import as_seed
        >>> as_seed(2**64 + 3, "cpu")
        tensor(3)
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got dtype {seed.dtype}; convert with seed.long()")
        if seed.dim() != 0:
            raise ValueError(
                f"seed: expected a tensor without dimensions, got shape {tuple(seed.shape)}; pass a 0-dimensional "
                f"one, for instance seed[0]"
            )
        return seed.to(device)
    # An int is asked for first: inside torch.compile a symbolic one answers to nothing else.
    if isinstance(seed, (bool, float)) or not (isinstance(seed, int) or hasattr(seed, "__index__")):
        raise TypeError(
            f"seed: expected an int or a 0-dimensional int64 tensor, got {seed!r} of type {type(seed).__name__}; pass "
            f"an int"
        )
    # full() writes on the device itself; torch.tensor() would copy from the host.
    value = seed if isinstance(seed, int) else seed.__index__()
    if not -(2**63) <= value < 2**63:
        value = wrap_to_int64(value)
    return torch.full((), value, dtype=torch.int64, device=device)
