"""Linear warm-up, then half a cosine down: the schedule of GPT-3 and MT-NLG (arXiv 1608.03983, without restarts)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtx.config.schema import Schedule
from mtx.optim.warmup import WarmupDecay


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(WarmupDecay, Schedule):
    """Rises linearly to `peak`, then falls to `final` along half a period of a cosine."""

    def remains(self, done: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * done))
