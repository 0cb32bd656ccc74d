"""Which source each sample of a run comes from.

Decides the interleaving of sources by weight. Does not decide the order within a source (`shuffle.py`).

Invariant: sample s is found without looking at those before it, and among the first s samples every source has its
share within (number of sources + 1) / 2 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mtx.errors import UserError

PERIOD = 1 << 16


class Blend:
    """A period of PERIOD samples that repeats; in it, the samples of each source lie evenly.

    Weights count to one part in PERIOD: the samples of a period are given out in proportion, by largest remainder.
    """

    def __init__(self, weights: Sequence[float]):
        """Args: weights: relative shares of the samples, one per source.

        Raises:
            UserError: A share is not positive, or too small to be drawn once in a period.
        """
        if not all(weight > 0 and np.isfinite(weight) for weight in weights):
            raise UserError(f"Data.train: weights must be positive, not {list(weights)}; leave out what has none")
        exact = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64) * PERIOD
        quotas = np.floor(exact).astype(np.int64)
        largest = np.argsort(quotas - exact, kind="stable")[: PERIOD - int(quotas.sum())]
        quotas[largest] += 1
        if not quotas.all():
            raise UserError(
                f"Data.train: a weight is under 1/{PERIOD} of the sum and would never be drawn: {list(weights)}"
            )
        self._quotas = quotas
        # Sample j of a source that has q in the period is due at (j + 1/2) / q of it; all are taken as they fall due.
        self._ranks = np.concatenate([np.arange(quota) for quota in quotas])
        self._sources = np.repeat(np.arange(len(quotas)), quotas)
        due = np.argsort((self._ranks + 0.5) / quotas[self._sources], kind="stable")
        self._sources, self._ranks = self._sources[due], self._ranks[due]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample, and how many samples that source gave before it.

        Args:
            samples: int64[n], numbers of samples from the beginning of the run.

        Returns:
            sources: int64[n]; positions: int64[n].
        """
        periods, places = np.divmod(samples, PERIOD)
        sources = self._sources[places]
        return sources, periods * self._quotas[sources] + self._ranks[places]

    def counts(self, sample: int) -> np.ndarray:
        """How many samples each source gives before a sample: int64[sources]."""
        periods, place = divmod(sample, PERIOD)
        return periods * self._quotas + np.bincount(self._sources[:place], minlength=len(self._quotas))

    def find(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The inverse of `locate`: the samples (int64[n]) that are a source's own number `positions` (int64[n])."""
        periods, ranks = np.divmod(positions, self._quotas[source])
        return periods * PERIOD + np.flatnonzero(self._sources == source)[ranks]


@lru_cache(maxsize=64)
def make_blend(weights: tuple[float, ...]) -> Blend:
    """The blend of some weights, made once however often a run comes back to it."""
    return Blend(weights)
