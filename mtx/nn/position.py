"""Rotary positions (arXiv 2104.09864) and ALiBi (arXiv 2108.12409)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtx.config.schema import Model, RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """float32[H / 2]: radians per token of each pair of dims; with Llama 3.1's stretching where it is asked for."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)  # in the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rotary_table(config: Model, places_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, H / 2] each, of the angles at the given places."""
    frequencies = rotary_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
    angles = places_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + H / 2) of dims by its angle: the pairing of the published Llama files."""
    cos, sin = table
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32[N]: the slope of each head; between powers of two as the authors' code has it."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, np.float32)
