"""A constant learning rate after a linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from mtx.config.schema import Run, Schedule
from mtx.optim.warmup import Warmup


@dataclass(frozen=True, kw_only=True)
class Constant(Warmup, Schedule):
    """Rises linearly to `peak` and stays there. Without a warm-up it is what a plain number is."""

    def after_warmup(self, run: Run, now: int) -> float:
        return self.peak
