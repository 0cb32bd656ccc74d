"""Linear warm-up, then a straight line down: the schedule of BERT and RoBERTa."""

from __future__ import annotations

from dataclasses import dataclass

from mtx.config.schema import Schedule
from mtx.optim.warmup import WarmupDecay


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(WarmupDecay, Schedule):
    """Rises linearly to `peak`, then falls linearly to `final`."""

    def remains(self, done: float) -> float:
        return 1.0 - done
