"""The cell's arithmetic in Triton, forward beside backward, each in the halves that a norm of the cell stands between.

With ``z`` the pre-activations, ``u`` the update mask, ``m`` the cell mask and ``ζ`` the zones::

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o);  g = tanh(z_g)
    candidate = m (f c_prev + u i g)                                            begin_cell
    h_candidate = o tanh(N_c(candidate))                                        finish_cell
    c = ζ_c c_prev + (1 - ζ_c) candidate,  h = ζ_h h_prev + (1 - ζ_h) h_candidate

All arithmetic is float32. Transcendentals go through ``exp2`` alone, which every device and the interpreter have, and
are exact to a few units in the last place at any argument; none overflows on the way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_of_negative(x):
    """``exp(x)`` for ``x <= 0``: a whole power of two times one of a rest that is too small to lose digits.

    Below -87 the result stands still at 1e-38, the last number that is not denormal.
    """
    x = tl.where(x < -87.0, -87.0, x)
    whole = tl.floor(x * 1.44269504088896341 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts, the first exact in its products
    return tl.exp2(whole) * tl.exp2(rest * 1.44269504088896341)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``, from the exponential that does not overflow."""
    e = exp_of_negative(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """``tanh(x)``: by exponentials, and near 0, where those cancel, by its odd polynomial."""
    magnitude = tl.abs(x)
    e = exp_of_negative(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    small = tl.where(magnitude < 0.625, x, 0.0)  # no overflow where the polynomial is not used
    square = small * small
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = small + small * square * series
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def zoned(zone, previous, candidate):
    """``zone * previous + (1 - zone) * candidate``; a mask of zeros and ones selects, so that no NaN leaks."""
    mixed = zone * previous + (1.0 - zone) * candidate
    return tl.where(zone == 0.0, candidate, tl.where(zone == 1.0, previous, mixed))


@triton.jit
def begin_cell(z_i, z_f, z_g, z_o, previous_cell, update_mask, cell_mask):
    """From pre-activations to ``i, f, g, o`` and the candidate cell."""
    i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
    return i, f, g, o, candidate_cell(i, f, g, previous_cell, update_mask, cell_mask)


@triton.jit
def candidate_cell(i, f, g, previous_cell, update_mask, cell_mask):
    """``m (f c_prev + u i g)``."""
    return (f * previous_cell + update_mask * i * g) * cell_mask


@triton.jit
def finish_cell(argument, o, candidate, previous_hidden, previous_cell, zone_hidden, zone_cell):
    """From ``N_c(candidate)`` to ``h``, ``c`` and ``h_candidate``."""
    hidden_candidate = o * tanh(argument)
    return (
        zoned(zone_hidden, previous_hidden, hidden_candidate),
        zoned(zone_cell, previous_cell, candidate),
        hidden_candidate,
    )


@triton.jit
def through_zone(zone, grad):
    """The shares of a state's gradient that go to the previous state and to the candidate."""
    previous = tl.where(zone == 0.0, 0.0, tl.where(zone == 1.0, grad, zone * grad))
    candidate = tl.where(zone == 0.0, grad, tl.where(zone == 1.0, 0.0, (1.0 - zone) * grad))
    return previous, candidate


@triton.jit
def leave_output(argument, o, grad_hidden_candidate):
    """Through ``h_candidate = o tanh(argument)``: the gradients of ``argument`` and of ``o``."""
    squashed = tanh(argument)
    return grad_hidden_candidate * o * (1.0 - squashed * squashed), grad_hidden_candidate * squashed


@triton.jit
def leave_cell(i, f, g, o, previous_cell, update_mask, cell_mask, grad_candidate, grad_o):
    """From the candidate cell's gradient to those of ``z_i, z_f, z_g, z_o`` and of ``c_prev``, through ``f`` alone."""
    grad = grad_candidate * cell_mask
    grad_update = grad * update_mask
    return (
        grad_update * g * i * (1.0 - i),
        grad * previous_cell * f * (1.0 - f),
        grad_update * i * (1.0 - g * g),
        grad_o * o * (1.0 - o),
        grad * f,
    )
