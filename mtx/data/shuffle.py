"""Keyed permutations that are computed, not stored.

Decides the order of samples within an epoch.

Invariant: the permutation of a key and a length never changes, on any machine or version of a library: a run that is
resumed years later sees the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

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
    mask, shift, constants = _schedule(length, key)

    def rounds(x: np.ndarray) -> np.ndarray:
        for added, factor in constants:
            x = (x + added) * factor & mask
            x = x ^ (x >> shift)
        return x

    return _walk(rounds, indices, length)


def unpermute(images: np.ndarray, length: int, key: str) -> np.ndarray:
    """The inverse of `permute`: int64[n], what the permutation sends to each of `images`, int64[n]."""
    mask, shift, constants = _schedule(length, key)
    inverses = [(added, np.uint64(pow(int(factor), -1, 1 << 64))) for added, factor in constants[::-1]]

    def rounds(x: np.ndarray) -> np.ndarray:
        for added, inverse in inverses:
            x = x ^ (x >> shift)  # its own inverse: what is folded down is at least half of the bits
            x = x * inverse - added & mask
        return x

    return _walk(rounds, images, length)


def _schedule(length: int, key: str) -> tuple[np.uint64, np.uint64, list[tuple[np.uint64, np.uint64]]]:
    """The mask of the bits, how far they are folded, and what each round adds and multiplies by."""
    bits = max(_MIN_BITS, (length - 1).bit_length())
    constants = np.frombuffer(hashlib.shake_128(key.encode()).digest(16 * _ROUNDS), "<u8").reshape(_ROUNDS, 2)
    rounds = [(added, factor | np.uint64(1)) for added, factor in constants]
    return np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2), rounds


def _walk(rounds: Callable[[np.ndarray], np.ndarray], indices: np.ndarray, length: int) -> np.ndarray:
    x = rounds(indices.astype(np.uint64))
    while len(outside := np.flatnonzero(x >= length)):
        x[outside] = rounds(x[outside])
    return x.astype(np.int64)
