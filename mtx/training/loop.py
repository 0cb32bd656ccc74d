"""Step after step, with everything else off the critical path: metrics, evaluations, checkpoints, care for the run.

Decides when a step is read, evaluated, saved, compared. What becomes of a spike or of a run that is told to stop is
decided in `run.py`; what a step computes, nowhere near here.

Invariant: nothing of a step is told or saved before its metrics were read and found sound.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mtx.checkpoints.store import Checkpoints
from mtx.data.prefetch import Prefetcher
from mtx.data.training import TrainingData
from mtx.errors import PreemptedError, StalledError, UserError
from mtx.health.preemption import Preemption
from mtx.health.spikes import Skipped, Spike, SpikeDetector
from mtx.health.startup import Startup
from mtx.health.stragglers import Stragglers
from mtx.health.watch import Watch
from mtx.planning.forecast import Forecast, journal_fields, read_peak_bytes
from mtx.planning.throughput import Throughput
from mtx.reports.reporter import Reporter
from mtx.training.digest import Digester, Digests, describe
from mtx.training.evaluate import Evaluation
from mtx.training.inputs import make_train_batch
from mtx.training.proof import batch_digest
from mtx.training.state import Setup, State
from mtx.training.step import Metrics, make_train_step

LAST_TRIES, PAUSE_S = 3, 5.0
"""How often, and how far apart, the last checkpoint of an attempt is tried to be saved where there is no room."""


@dataclass(frozen=True)
class Surroundings:
    """What a loop tells and asks besides computing. `record` does nothing on processes other than 0; `forecast` is None
    where nothing is known of the devices."""

    checkpoints: Checkpoints
    record: Callable[..., None]
    reporter: Reporter
    preemption: Preemption
    watch: Watch
    startup: Startup
    stragglers: Stragglers | None
    forecast: Forecast | None


class Loop:
    """The steps of one attempt. The device always has a step to do: step n is dispatched, then n - 1 is read."""

    def __init__(
        self, setup: Setup, digester: Digester, around: Surroundings, total_steps: int, meta: Mapping[str, Any]
    ) -> None:
        """Args: total_steps: the last one; meta: what every checkpoint says about the program that wrote it."""
        self.setup, self.digester, self.around = setup, digester, around
        self.total_steps, self.meta = total_steps, meta
        self._program: Any = None
        self._program_digest = ""
        self._longest_step = self._longest_save = 0.0
        self._is_compared_with_plan = around.forecast is None

    def run(
        self,
        state: State,
        start: int,
        data: TrainingData,
        detector: SpikeDetector,
        on_first_step: Callable[[Mapping[str, Any], str], None],
    ) -> tuple[Spike, int] | None:
        """From the state after step `start` to the last step, which is saved, or to a spike.

        Args:
            state: Consumed.
            start: Updates done.
            data: What is read.
            detector: Judges losses.
            on_first_step: Called with the metrics of the first step and the digest of the program, before anything is
                told or saved; raises where they prove that something is wrong.

        Returns:
            The spike and the step that it was found at; None where the run is done.

        Raises:
            PreemptedError: The run was asked to stop; everything is saved.
            StalledError: Copies of an array differ: a device computes wrongly.
            UserError: The last checkpoint could not be saved.
        """
        self.data, self.detector, self._on_first_step = data, detector, on_first_step
        self._evaluation, self._throughput = Evaluation(self.setup, data), Throughput(self.setup, data.sizes)
        self._first_step, self._own_seconds = start + 1, 0.0
        self._last_logged: int | None = None
        self._unproven: tuple[int, Future[str] | None] | None = None
        self._validation: dict[str, float | None] = {}  # after the step that is saved
        if start >= self.total_steps:
            return None

        def make_batch(step: int) -> Any:
            return make_train_batch(self.setup, data.train, data.sizes, step)

        depth = self.setup.run.data.prefetch
        with (
            Prefetcher(make_batch, first_step=start, depth=depth) as batches,
            ThreadPoolExecutor(1, thread_name_prefix="batch digest") as self._thread,
        ):
            return self._run(state, start, batches)

    def _run(self, state: State, start: int, batches: Prefetcher[Any]) -> tuple[Spike, int] | None:
        enter = self.around.watch.enter
        enter("data", start)
        batch = batches.get(start)
        train_step = self._compile(state, batch)
        self._throughput.begin(start)
        unread: tuple[int, Metrics] | None = None
        for step in range(start + 1, self.total_steps + 1):
            enter("step", step)
            state, metrics = train_step(state, batch)
            begin = time.perf_counter()
            enter("data", step)
            batch = batches.get(step)  # after the last step, too: its checkpoint holds what this batch gives
            self._own_seconds += time.perf_counter() - begin
            if unread is not None and (spike := self._read(*unread, batches)):
                return spike, unread[0]
            unread = step, metrics
            ends = step == self.total_steps
            stops = self.around.preemption.requested(reserve_seconds=self._longest_step + self._longest_save)
            evaluates, saves, compares, times = self._due(step, ends, stops)
            if evaluates or saves or compares or times:
                if spike := self._read(*unread, batches):
                    return spike, step
                unread = None
                self._validation = self._evaluate(state["params"], step) if evaluates else {}
                if compares and not saves:
                    self._compare_copies(state, step)
                if saves:
                    self._save(state, step, must=ends or stops)
                if ends or stops:
                    self._end(train_step, state, batch, step, stops and not ends)
                if times:
                    self._compare_times(step)
                self._throughput.begin(step, batches.wait_seconds)
        return None

    def _due(self, step: int, ends: bool, stops: bool) -> tuple[bool, bool, bool, bool]:
        """Whether after a step the run evaluates, saves, compares copies of its arrays, and times of its processes."""
        run = self.setup.run
        times = self.around.stragglers is not None and _is_multiple(step, run.health.straggler_every)
        evaluates = (ends or _is_multiple(step, run.train.eval_every)) and not (stops and not ends)
        saves = ends or stops or _is_multiple(step, run.checkpoint.every_steps)
        return evaluates, saves, _is_multiple(step, run.health.digest_every), times

    def _compile(self, state: State, batch: Any) -> Callable[..., Any]:
        if self._program is None:
            self.around.watch.enter("compile", self._first_step - 1)
            startup, begin = self.around.startup, time.perf_counter()
            startup.end("first batch")
            traced = make_train_step(self.setup).trace(state, batch)
            startup.end("trace")
            lowered = traced.lower()
            startup.end("lower")
            self._program = lowered.compile()
            startup.end("compile, or read from the cache")
            memory, seconds = self._program.memory_analysis(), time.perf_counter() - begin
            self.around.record(
                "compiled",
                seconds=seconds,
                temp_bytes=memory.temp_size_in_bytes if memory else None,
                argument_bytes=memory.argument_size_in_bytes if memory else None,
            )
            self.around.reporter.message(f"compiled the step in {seconds:.1f} s")
            self._program_digest = hashlib.blake2b(lowered.as_text().encode(), digest_size=8).hexdigest()
        return self._program

    def _read(self, step: int, metrics: Metrics, batches: Prefetcher[Any]) -> Spike | None:
        """Waits for a step, judges it and reports it."""
        self.around.watch.enter("wait", step)
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        if step == self._first_step:
            self._on_first_step(values, self._program_digest)
            # Takes seconds of the interpreter, which has nothing to do from now on.
            self.around.checkpoints.warm_up()
        self._amend(step, values)
        if self.data.sizes.blend(step - 1) != self.data.sizes.blend(max(0, step - 2)):
            self.detector.forget()  # the loss of other data is another one
        match self.detector.observe(step, values["loss"], values["grad_norm"], skipped=values["skipped"]):
            case Spike() as spike:
                return spike
            case Skipped(cause):
                self.around.record("skipped", step=step, cause=cause)
                self.around.reporter.told("skipped", step=step, cause=cause)
        train = self.setup.run.train
        if step % train.log_every == 0 or step == 1:
            optimizer: Any = train.optimizer
            tokens = self.data.sizes.tokens(step)
            measured = self._throughput.measure(step, batches.wait_seconds)
            self._longest_step = max(self._longest_step, measured["step_seconds"] or 0.0)
            record = {
                "step": step,
                "tokens": tokens,
                **{name: value for name, value in values.items() if name not in ("target_tokens", "skipped")},
                "learning_rate": optimizer.learning_rate_at(self.setup.run, step, tokens),
                **measured,
            }
            self.around.reporter.log(record)
            if not self._is_compared_with_plan:
                self._compare_with_plan(step, measured["step_seconds"])
            self._last_logged = step
        return None

    def _compare_with_plan(self, step: int, step_seconds: float | None) -> None:
        """Plan beside measurement, once: at the first stretch of whole batches that the first step is not in."""
        begin = self._last_logged
        if begin is None or step_seconds is None or self.data.sizes.size(begin) < self.data.sizes.max:
            return
        peak_bytes = read_peak_bytes(self.setup.mesh.local_devices)
        fields = journal_fields(self.around.forecast, step_seconds=step_seconds, peak_bytes=peak_bytes)
        self.around.record("plan", step=step, **fields)
        self.around.reporter.told("plan", step=step, **fields)
        self._is_compared_with_plan = True

    def _evaluate(self, params: Any, step: int) -> dict[str, float | None]:
        """The losses on the validation sets; None where one is not finite."""
        self.around.watch.enter("evaluate", step)
        begin, losses = time.perf_counter(), dict[str, float | None]()
        for name, loss, tokens in self._evaluation.losses(params):
            losses[name] = loss if math.isfinite(loss) else None
            self.around.reporter.evaluated(name, step, loss, tokens=tokens)
        self.around.record("evaluated", step=step, seconds=time.perf_counter() - begin)
        return losses

    def _save(self, state: State, step: int, *, must: bool) -> None:
        """Starts to save a state. Where there is no room for it the run goes on, if it may."""
        self.around.watch.enter("save", step)
        begin = time.perf_counter()
        stored, probed = self.setup.canonical.store(state), self.setup.run.checkpoint.probe
        digests = self._compare_copies(stored, step) if probed else None
        meta = {
            **self.meta,
            "tokens": self.data.sizes.tokens(step),
            "samples": self.data.sizes.first_sample(step),
            "ledger": self.data.sizes.ledger(step),
            "data": json.dumps(self.data.sizes.entry(step).to_json()),  # text: a manifest would sort the stages
            "validation": self._validation,
            "spikes": self.detector.state(),
            **({} if digests is None else {"digests": digests.leaf_digests(), "program": self._program_digest}),
        }
        tries = LAST_TRIES if must else 1
        while not (begun := self.around.checkpoints.save(step, stored, meta)) and (tries := tries - 1):
            time.sleep(PAUSE_S)
        if begun:
            self._unproven = (step, self._digest_batch(step)) if probed else None
            if not probed:
                self.around.checkpoints.amend({})
            seconds = time.perf_counter() - begin
            self._longest_save = max(self._longest_save, seconds)
            self.around.record("saved", step=step, seconds=seconds)
        elif must:
            self._refuse_to_end(step)

    def _digest_batch(self, step: int) -> Future[str] | None:
        """The digest of the batch after a step, made on the side, by process 0."""
        if jax.process_index() > 0:
            return None
        return self._thread.submit(batch_digest, self.data.train, step, self.data.sizes.size(step))

    def _amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds to the checkpoint of the step before what this step gave: whoever resumes there must get it again."""
        if self._unproven is None or self._unproven[0] != step - 1:
            return
        batch = self._unproven[1]
        self._unproven = None
        probe = {name: values[name] for name in ("loss", "grad_norm")}
        if not all(map(math.isfinite, probe.values())):
            self.around.checkpoints.amend({})  # nothing that could be repeated
        else:
            self.around.checkpoints.amend({"probe": {**probe, "batch": None if batch is None else batch.result()}})

    def _end(self, train_step: Any, state: State, batch: Any, step: int, stops: bool) -> None:
        """Completes the last checkpoint of an attempt."""
        if self._unproven is not None:
            # The next step, of which only the metrics are kept. It runs while the checkpoint is written.
            _, metrics = train_step(state, batch)
            self._amend(step + 1, {name: np.asarray(value).tolist() for name, value in metrics.items()})
        self.around.watch.enter("save", step)
        if not self.around.checkpoints.wait():
            self._refuse_to_end(step)
        if stops:
            cause = self.around.preemption.cause
            self.around.record("preempted", step=step, cause=cause)
            raise PreemptedError(f"stopped after step {step} ({cause}); everything is saved: the same command goes on")

    def _refuse_to_end(self, step: int) -> None:
        saved = self.around.checkpoints.steps()
        raise UserError(
            f"the checkpoint of step {step} could not be saved: make room on the disk of "
            f"{self.around.checkpoints.directory}; the same command goes on from "
            + (f"step {saved[-1]}" if saved else "the beginning")
        )

    def _compare_copies(self, state: Any, step: int) -> Digests:
        """Digests a state. Ends the run where what should be copies of one array differ."""
        digests = self.digester(state)
        if differing := digests.disagreements():
            cause = describe(differing)
            self.around.record("corruption", step=step, cause=cause)
            raise StalledError(
                f"step {step}: {cause}. A device computes or remembers wrongly; nothing of this is saved: take that "
                "host out, and start again from the last checkpoint"
            )
        return digests

    def _compare_times(self, step: int) -> None:
        """Names processes that are slow by themselves. The devices have nothing to do."""
        assert self.around.stragglers is not None
        waited, self._own_seconds = self._own_seconds, 0.0
        for sentence in self.around.stragglers.compare(step, {"waiting for data": waited}):
            self.around.reporter.message(sentence)


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
