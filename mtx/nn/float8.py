"""Matrix products of 8-bit numbers with float32 sums, forward and backward (arXiv 2209.05433).

Decides the formats (e4m3 for inputs and weights, e5m2 for the gradients of outputs), how a tensor is scaled into one,
and what is kept for the backward pass. Which products these are is the config's (`Precision.float8_products`).

Scaling is current: the largest magnitude of the tensor at hand, so no state goes from step to step. The tensor is a
device's shard of rows or of the weight, and a product leaves this file unscaled, so partial sums over devices add up
as they are. A scale is a power of two, which costs at most half of the range of a format and none of its digits: a
value rounds alike under any scale that does not push it below the smallest normal number, hence alike in any layout,
and dividing by a scale and multiplying with it are exact.

Invariant: the numbers that are multiplied are the 8-bit ones, whatever the device, and a product is scaled behind its
sum. XLA makes one 8-bit product of cuBLASLt of it, the scale included, on GPUs that have it, and widens the factors
elsewhere. Only the order of sums differs. (Factors that are scaled in front, as XLA's own pattern has them, it merges
in 16 bits where two products share one, before it looks for 8 bits: jax 0.10.2, compiled for H200.)

Invariant: a tensor that holds a NaN or an infinity makes all of its products NaN. An 8-bit number has no room for an
infinity or would be cut to the largest one, and a step that must be skipped would go by unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import shared_varying

INPUT, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
"""Four bits for the exponent and three for digits, up to 448; five and two, up to 57344. Both end at 1.75 * 2^n."""

LARGEST_EXPONENT = {INPUT: 8, GRADIENT: 15}
SMALLEST_SCALE = 2.0**-60
"""So that the product of two scales is a normal number."""

MIN_CAPABILITY = 8.9
"""Compute capability from which on GPUs multiply 8-bit numbers: Ada, Hopper and later."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """The input of one or several products, rounded once for all of them.

    Attributes:
        exact: The input, bfloat16 [..., inputs]. Its gradient is the products'.
        bits: The same over the scale, in e4m3, as uint8: of float values that it keeps `jax.checkpoint` cuts the
            precision to that of their type, and takes the largest of e4m3 to be 240 (jax 0.10).
        scale: float32 [], a power of two.
    """

    exact: jax.Array
    bits: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        return self.exact.shape


def round_input(x: jax.Array) -> Rounded:
    """The input of products in 8 bits. The rounding is no part of the derivative."""
    fixed = lax.stop_gradient(x)
    scale = choose_scale(fixed, INPUT)
    return Rounded(x, lax.bitcast_convert_type(_divide(fixed, scale, INPUT), jnp.uint8), scale)


def multiply(x: Rounded, w: jax.Array) -> jax.Array:
    """x @ w of the rounded factors: [..., inputs], bfloat16 [inputs, outputs] -> bfloat16 [..., outputs].

    The gradient of x is that of y times w^T, and that of w is x^T times that of y: again of rounded factors.
    """
    return _multiply(*shared_varying(x.exact, x.bits, x.scale, w))


def choose_scale(x: jax.Array, kind: jnp.dtype) -> jax.Array:
    """float32 []: the smallest power of two over which all of x is within the range of a format.

    1 where x is zero, NaN where x holds a NaN or an infinity.

    Args:
        kind: INPUT or GRADIENT.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    scale = power * 2.0 ** -LARGEST_EXPONENT[kind]
    scale = jnp.where(largest > 1.75 * power, 2 * scale, scale)
    scale = jnp.where(largest > 0, jnp.maximum(scale, SMALLEST_SCALE), 1.0)
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def _divide(x: jax.Array, scale: jax.Array, kind: jnp.dtype) -> jax.Array:
    return (x.astype(jnp.float32) * (1 / scale)).astype(kind)


def _product(
    a: jax.Array, b: jax.Array, summed: tuple[int, int], scale: jax.Array, precision: lax.Precision
) -> jax.Array:
    """bfloat16: the product of two matrices over a dim of each, times a power of two, which rounds nothing."""
    dims = (((summed[0],), (summed[1],)), ((), ()))
    y = lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.bfloat16)
    return y * scale.astype(jnp.bfloat16)


def _rows(bits: jax.Array) -> jax.Array:
    """e4m3 [rows, inputs]."""
    return lax.bitcast_convert_type(bits.reshape(-1, bits.shape[-1]), INPUT)


@jax.custom_vjp
def _multiply(x: jax.Array, bits: jax.Array, scale: jax.Array, w: jax.Array) -> jax.Array:
    return _multiply_forward(x, bits, scale, w)[0]


Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _multiply_forward(x: jax.Array, bits: jax.Array, scale: jax.Array, w: jax.Array) -> tuple[jax.Array, Saved]:
    """Kept are the input in 8 bits, and the weight as it came, which is there anyway: rounding it again is one pass."""
    w_scale = choose_scale(w, INPUT)
    w_values = _divide(w, w_scale, INPUT)
    y = _product(_rows(bits), w_values, (1, 0), scale * w_scale, lax.Precision.DEFAULT)
    return y.reshape(*x.shape[:-1], -1), (bits, scale, w, w_scale)


def _multiply_backward(saved: Saved, dy: jax.Array) -> tuple[jax.Array, None, None, jax.Array]:
    bits, scale, w, w_scale = saved
    d_rows = dy.reshape(-1, dy.shape[-1])
    d_scale = choose_scale(d_rows, GRADIENT)
    d_values = _divide(d_rows, d_scale, GRADIENT)
    # Hopper sums 8-bit products in fewer digits than float32 has unless it is asked for more. Gradients ask.
    dx = _product(d_values, _divide(w, w_scale, INPUT), (1, 1), d_scale * w_scale, lax.Precision.HIGHEST)
    dw = _product(_rows(bits), d_values, (0, 0), scale * d_scale, lax.Precision.HIGHEST)
    return dx.reshape(bits.shape), None, None, dw


_multiply.defvjp(_multiply_forward, _multiply_backward)
