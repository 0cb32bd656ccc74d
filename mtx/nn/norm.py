"""LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtx.config.schema import Model
from mtx.nn.param import Module, Rngs, param


class Norm(Module):
    """Normalises the last dim; the gain starts at one. Statistics in float32: bfloat16 squares lose the variance."""

    def __init__(self, rngs: Rngs, config: Model):
        self.eps, self.centered = config.norm_eps, config.norm == "layernorm"
        self.gain = param(rngs, jax.nn.initializers.ones, (config.d_model,), ("embed",))
        has_bias = self.centered and config.use_bias
        self.bias = param(rngs, jax.nn.initializers.zeros, (config.d_model,), ("embed",)) if has_bias else None

    def __call__(self, x_BTD: jax.Array, dtype: Any) -> jax.Array:
        """[B, T, D] -> dtype[B, T, D]."""
        x = x_BTD.astype(jnp.float32)
        if self.centered:
            x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * self.gain[...]
        return (x if self.bias is None else x + self.bias[...]).astype(dtype)
