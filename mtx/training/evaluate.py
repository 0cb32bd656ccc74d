"""The loss on the validation sets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from mtx.data.training import TrainingData
from mtx.training.inputs import make_eval_batch
from mtx.training.state import Setup
from mtx.training.step import make_eval_step


class Evaluation:
    """Measures weights on every validation set of a run; compiled at its first use."""

    def __init__(self, setup: Setup, data: TrainingData) -> None:
        self._setup, self._data = setup, data

    @cached_property
    def _step(self) -> Any:
        return make_eval_step(self._setup)

    def losses(self, params: Any) -> Iterator[tuple[str, float, int]]:
        """Name, mean loss (nats per target token) and number of target tokens of each validation set."""
        for name, reader in self._data.validation.items():
            sums = [self._step(params, make_eval_batch(self._setup, reader, i)) for i in range(reader.num_batches)]
            weight = sum(float(weight) for _, weight in sums)
            yield name, sum(float(loss) for loss, _ in sums) / weight, int(weight)
