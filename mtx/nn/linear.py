"""Matrix products with their weights, and what their gradients are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.collectives import shared_varying
from mtx.nn import float8
from mtx.nn.param import Module, Rngs, param


@jax.custom_vjp
def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w: [..., inputs], [inputs, outputs] -> [..., outputs].

    JAX's own rule makes the weight's gradient transposed and turns it round. XLA on CPU then copies the incoming
    gradient transposed for each weight, and into each copy it fuses the whole chain of residual additions behind it:
    work quadratic in the number of layers. Written as x^T dy, neither happens.
    """
    return jnp.dot(x, w)


def _multiply_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, w), (x, w)


def _multiply_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = lax.dot_general(d_rows, w, (((1,), (1,)), ((), ())))
    dw = lax.dot_general(rows, d_rows, (((0,), (0,)), ((), ())))
    return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


@jax.custom_vjp
def _add_bias(y: jax.Array, b: jax.Array) -> jax.Array:
    """y + b. Its gradient sums over tokens; on a CPU as a product with ones, since XLA is slow at sums down columns
    there. On a GPU such a product would read a copy in float32."""
    return y + b.astype(y.dtype)


def _add_bias_forward(y: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add_bias(y, b), b


def _add_bias_backward(b: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_rows = dy.reshape(-1, dy.shape[-1])

    def multiply(d_rows: jax.Array) -> jax.Array:
        ones = jnp.ones((1, d_rows.shape[0]), d_rows.dtype)
        return jnp.dot(ones, d_rows, preferred_element_type=jnp.float32)[0]

    def add(d_rows: jax.Array) -> jax.Array:
        return jnp.sum(d_rows, axis=0, dtype=jnp.float32)

    return dy, lax.platform_dependent(d_rows, cpu=multiply, default=add).astype(b.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Linear(Module):
    """y = x @ w + b, with w always two-dimensional: heads are merged, so that its gradient is one plain matmul.

    Args:
        rngs: Source of the initial values.
        shape: (inputs, outputs).
        axes: Logical axis of each.
        std: Of the normal initializer; biases start at zero.
        use_bias: Whether there is a b.
    """

    def __init__(self, rngs: Rngs, shape: tuple[int, int], axes: tuple[str, str], *, std: float, use_bias: bool):
        self.weight = param(rngs, jax.nn.initializers.normal(std), shape, axes)
        self.bias = param(rngs, jax.nn.initializers.zeros, shape[1:], axes[1:]) if use_bias else None

    def multiply(self, x: jax.Array | float8.Rounded, dtype: Any) -> jax.Array:
        """x @ w without the bias: [..., inputs] -> dtype[..., outputs]."""
        if isinstance(x, float8.Rounded):
            return float8.multiply(x, self.weight[...].astype(dtype))
        return _multiply(*shared_varying(x, self.weight[...].astype(dtype)))

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias where there is one. Partial products are summed first: the bias must be added once."""
        return y if self.bias is None else _add_bias(*shared_varying(y, self.bias[...]))

    def __call__(self, x: jax.Array | float8.Rounded, dtype: Any) -> jax.Array:
        """[..., inputs] -> dtype[..., outputs]."""
        return self.add_bias(self.multiply(x, dtype))
