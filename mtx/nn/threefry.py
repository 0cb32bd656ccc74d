"""JAX's own random bits, computed in one pass: keys whose draws equal those of `jax.random.key(seed)` to the bit.

On a CPU JAX runs the rounds of Threefry as a loop over arrays, each of them written to memory and read again; written
one after the other they are one fusion with what is made of the bits: a third of the time, and no temporary memory.

The function is Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Value
i of an array is the exclusive or of both words that it gives for the count i, as with `jax_threefry_partitionable`, so
that the values do not depend on how the array is sharded.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import lax
from jax.extend import random as generators

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_JAX = generators.threefry_prng_impl


def random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """uint32 [2] -> unsigned integers of `bit_width` bits. What is not 32 bits wide is left to JAX."""
    if bit_width != 32 or math.prod(shape) >= 2**32 or not jax.threefry_partitionable.value:
        return _JAX.random_bits(key, bit_width, shape)
    counts = lax.full(shape, np.uint32(0))
    for dim, length in enumerate(shape):
        stride = np.uint32(math.prod(shape[dim + 1 :]))
        counts = counts + lax.broadcasted_iota(np.uint32, shape, dim) * stride if length > 1 else counts
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    left, right = lax.full(shape, np.uint32(0)) + keys[0], counts + keys[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            left = left + right
            right = left ^ ((right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation)))
        left = left + keys[(turn + 1) % 3]
        right = right + (keys[(turn + 2) % 3] + np.uint32(turn + 1))
    return left ^ right


IMPLEMENTATION = generators.define_prng_impl(
    key_shape=_JAX.key_shape,
    seed=_JAX.seed,
    split=_JAX.split,
    random_bits=random_bits,
    fold_in=_JAX.fold_in,
    name="threefry in one pass",
    tag="1fry",
)
"""For `jax.random.key(seed, impl=...)`."""
