"""Warmup-stable-decay (arXiv 2404.06395): constant for most of the run, so that its length may be decided late."""

from __future__ import annotations

from dataclasses import dataclass

from mtx.config.schema import Schedule, setting
from mtx.optim.warmup import WarmupDecay


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(WarmupDecay, Schedule):
    """Rises linearly to `peak`, stays, and falls linearly to `final` at the end.

    Source: arXiv 2404.06395, section 4.2, which leaves the shape of the decay open; there it is exponential.
    """

    decay_share: float = setting(
        0.1, low=1e-6, high=1.0, doc="share of the time after the warm-up that the decay takes"
    )

    def remains(self, done: float) -> float:
        return min(1.0, (1.0 - done) / self.decay_share)
