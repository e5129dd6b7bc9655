"""Whole numbers on their way into a kernel, in a form of which Triton has nothing to compile in.

Triton compiles a kernel anew for a number that is 1 and for one that 16 divides; ``do_not_specialize`` keeps it from
that for plain arguments, but not for the members of a tuple. Packed, a number is odd, never 1, and of 64 bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.backends.triton.layout import Numbers, Rates, Sizes


def _packed(value: float) -> float:
    return value if isinstance(value, float) else ((value << 2) | 3) + 2**40


def packed_sizes(sizes: Sizes) -> Sizes:
    """The numbers as a kernel is given them; :func:`restored_sizes` undoes it there."""
    return Sizes._make(map(_packed, sizes))


def packed_numbers(sizes: Sizes, rates: Rates) -> Numbers:
    """The numbers as a kernel is given them; :func:`restored_numbers` undoes it there."""
    return Numbers(packed_sizes(sizes), Rates._make(map(_packed, rates)))


@triton.jit
def restored(number):
    """The ``int32`` that was packed."""
    return ((number >> 2) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def restored_sizes(sizes):
    """What :func:`packed_sizes` was given."""
    return Sizes(restored(sizes.steps), restored(sizes.rows), restored(sizes.running_rows), restored(sizes.group_rows))


@triton.jit
def restored_numbers(numbers):
    """What :func:`packed_numbers` was given."""
    rates = numbers.rates
    return Numbers(
        restored_sizes(numbers.sizes),
        Rates(
            restored(rates.stream),
            restored(rates.hidden_threshold),
            restored(rates.update_threshold),
            rates.update_scale,
            restored(rates.cell_threshold),
            rates.cell_expectation,
            restored(rates.zoneout_hidden_threshold),
            rates.zoneout_hidden,
            restored(rates.zoneout_cell_threshold),
            rates.zoneout_cell,
            restored(rates.output_threshold),
            rates.output_scale,
            restored(rates.dropout_threshold),
            rates.dropout_scale,
            rates.recurrent_scale,
            rates.eps,
        ),
    )
