"""Matrix products with their weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtx.nn.param import Module, Rngs, param


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

    def multiply(self, x: jax.Array, dtype: Any) -> jax.Array:
        """x @ w without the bias: [..., inputs] -> dtype[..., outputs]."""
        return jnp.dot(x, self.weight[...].astype(dtype))

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias where there is one. Partial products are summed first: the bias must be added once."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """[..., inputs] -> dtype[..., outputs]."""
        return self.add_bias(self.multiply(x, dtype))
