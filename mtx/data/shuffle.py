"""Keyed permutations that are computed, not stored.

Decides the order of samples within an epoch.

Invariant: the permutation of a key and a length never changes, on any machine or version of a library: a run that is
resumed years later sees the same data.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_MIN_BITS = 4  # so that few samples have many orders, too


def permute(indices: np.ndarray, length: int, key: str) -> np.ndarray:
    """Where a permutation of 0 .. length-1 sends some of them. Costs the same for any length, and no memory.

    Each round adds a constant, multiplies by an odd one and folds the upper half of the bits onto the lower: three
    bijections of the integers of so many bits. Where the result is not below `length`, the rounds are applied again
    ("cycle walking", Black and Rogaway 2002): on average less than twice, as `length` has that many bits.

    Args:
        indices: int64[n], each in [0, length).
        length: Number of things permuted.
        key: Any text; another one is another permutation.

    Returns:
        int64[n].
    """
    bits = max(_MIN_BITS, (length - 1).bit_length())
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    constants = np.frombuffer(hashlib.shake_128(key.encode()).digest(16 * _ROUNDS), "<u8").reshape(_ROUNDS, 2)
    odd = np.uint64(1)

    def rounds(x: np.ndarray) -> np.ndarray:
        for added, factor in constants:
            x = (x + added) * (factor | odd) & mask
            x = x ^ (x >> shift)
        return x

    x = rounds(indices.astype(np.uint64))
    while len(outside := np.flatnonzero(x >= length)):
        x[outside] = rounds(x[outside])
    return x.astype(np.int64)
