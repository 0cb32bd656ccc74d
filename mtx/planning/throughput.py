"""Seconds, tokens and FLOPs per second of the steps of a run."""

from __future__ import annotations

import time

from mtx.data.ramp import Sizes
from mtx.planning.flops import model_flops_per_token
from mtx.planning.hardware import find_gpu
from mtx.training.state import Setup


class Throughput:
    """Measures stretches of steps between pauses. Attention counts in full (planning.flops), recomputation does not."""

    def __init__(self, setup: Setup, sizes: Sizes) -> None:
        whole, run = setup.definition.whole, setup.run
        self._sizes, self._devices = sizes, setup.mesh.size
        self._flops_per_token = model_flops_per_token(run.model, whole.params, whole.axes, run.train.seq_len)
        gpu = find_gpu(setup.mesh.devices.flat[0].device_kind)
        self._peak_flops = None if gpu is None else gpu.peak_flops(run.precision.compute)
        self.begin(0)

    def begin(self, step: int, waited: float = 0.0) -> None:
        """Starts a stretch after `step`."""
        self._step, self._time, self._waited = step, time.perf_counter(), waited

    def measure(self, step: int, waited: float) -> dict[str, float | None]:
        """Means over the steps since the stretch began, in the keys of `metrics.jsonl`; begins a new stretch.

        Args:
            step: The last step that is finished.
            waited: Seconds that steps have waited for data, in all.
        """
        begin, first, waited_before = self._time, self._step, self._waited
        self.begin(step, waited)
        seconds, steps = self._time - begin, step - first
        tokens_per_second = (self._sizes.tokens(step) - self._sizes.tokens(first)) / seconds
        flops = self._flops_per_token * tokens_per_second / self._devices
        return {
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens_per_second,
            "model_tflops_per_device": flops / 1e12,
            "mfu": None if self._peak_flops is None else flops / self._peak_flops,
            "data_wait_seconds": (waited - waited_before) / steps,
        }
