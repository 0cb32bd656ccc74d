"""The story of a run: set up, restore or begin, then step after step, with everything else off the critical path.

Invariant: what a run computes depends on its config and its step alone; this file decides only when it is told to the
outside, saved and stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtx.checkpoints.run_directory import RunDirectory, choose_step, digest_config
from mtx.checkpoints.store import Checkpoints
from mtx.config.checks import require_training_data
from mtx.config.layout import check_layout, resolve_mesh
from mtx.config.reader import Config
from mtx.data.prefetch import Prefetcher
from mtx.data.training import TrainingData, open_training_data
from mtx.errors import DivergedError, PreemptedError, UserError
from mtx.health.journal import Journal
from mtx.health.preemption import Preemption
from mtx.mesh import make_mesh
from mtx.models import count_parameters
from mtx.planning.throughput import Throughput
from mtx.reports.reporter import Reporter
from mtx.sharding import axis_sizes
from mtx.training.evaluate import Evaluation
from mtx.training.inputs import make_train_batch
from mtx.training.state import Setup, State
from mtx.training.step import Metrics, make_train_step


@dataclass(frozen=True)
class Trained:
    """A run after its last step."""

    directory: RunDirectory
    setup: Setup
    state: State


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: str = "auto",
    accept: frozenset[str] = frozenset(),
    quiet: bool = False,
) -> Trained:
    """Trains, or goes on where the run directory stands, until the last step.

    Args:
        config: The run.
        run_dir: Made where it does not exist.
        resume: `auto` (the newest checkpoint that verifies), `never`, or the number of a step.
        accept: Keys whose change against the checkpoint's config is agreed to.
        quiet: Whether nothing is printed.

    Raises:
        UserError: The config does not fit the data, the devices or the run directory.
        CheckpointError: There are checkpoints and none verifies.
        DivergedError: The loss is not a number any more.
        PreemptedError: The process was asked to stop; everything is saved.
    """
    run = config.run
    require_training_data(run)
    counts = resolve_mesh(run.mesh, jax.device_count())
    check_layout(run, counts, config.provenance)
    setup = Setup(run, make_mesh(counts))
    data = open_training_data(run)
    total_steps = data.sizes.step_at_tokens(run.train.tokens or 0) if run.train.steps is None else run.train.steps
    is_primary = jax.process_index() == 0

    with ExitStack() as stack:
        directory = _open_directory(config, run_dir, data, resume)
        checkpoints = stack.enter_context(
            directory.checkpoints(keep_last=run.checkpoint.keep_last, keep_every=run.checkpoint.keep_every)
        )
        start = None if resume == "never" else choose_step(checkpoints, None if resume == "auto" else int(resume))
        changes: list[str] = []
        if is_primary:
            meta = {} if start is None else checkpoints.meta(start)
            drift = directory.check_resume(
                config, step=start, meta=meta, accepted=accept, tokenizer_files=data.tokenizer_files
            )
            directory.record(config, start or 0)
            changes = [*drift.free, *drift.accepted]
        if start is not None:
            checkpoints.set_aside_after(start)
        journal = Journal(directory.path, config_digest=digest_config(config), process=jax.process_index())
        stack.callback(journal.close)
        reporter = stack.enter_context(
            Reporter(directory.path, total_steps=total_steps, start_step=start or 0, quiet=quiet, is_primary=is_primary)
        )
        preemption = stack.enter_context(Preemption(num_processes=jax.process_count()))
        parameters, kind = count_parameters(run.model), jax.devices()[0].device_kind
        mesh = {axis: size for axis, size in axis_sizes(setup.mesh).items() if size > 1}
        if is_primary:
            journal.record("start", devices=setup.mesh.size, device_kind=kind, mesh=mesh, parameters=parameters)
        layout = ", ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"
        reporter.message(f"{directory.path}: {parameters:,} parameters, {total_steps:,} steps, on {kind} ({layout})")
        if start is None:
            state = setup.initialize()
        else:
            state = _restore(checkpoints, setup, start)
            if is_primary:
                journal.record("resumed", step=start, changes=changes)
            reporter.message(f"goes on from step {start}" + "".join(f"\n  {line}" for line in changes))
        loop = _Loop(
            setup=setup,
            data=data,
            checkpoints=checkpoints,
            record=journal.record if is_primary else lambda event, **fields: None,
            reporter=reporter,
            preemption=preemption,
            meta={"config_digest": digest_config(config), **_describe(setup)},
        )
        state = loop.run(state, start or 0, total_steps)
    return Trained(directory, setup, state)


def _open_directory(config: Config, run_dir: Path, data: TrainingData, resume: str) -> RunDirectory:
    """The run directory, made by process 0 where there is none."""
    exists = RunDirectory.exists(run_dir)
    _sync("mtx.run_directory.looked")  # before process 0 makes it, or others see half of it
    if exists and resume == "never":
        raise UserError(
            f"{run_dir} is the directory of a run; --resume auto goes on with it, another --run-dir does not"
        )
    if not exists and resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: {run_dir} does not exist")
    if not exists and jax.process_index() == 0:
        RunDirectory.create(run_dir, config.text(), data.tokenizer_files)
    _sync("mtx.run_directory.made")
    return RunDirectory.open(run_dir)


def _sync(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _restore(checkpoints: Checkpoints, setup: Setup, step: int) -> State:
    """The state of a step; where it holds imported weights alone, the state before the first update."""
    if checkpoints.parts(step) == {"params"}:
        wanted = {"params": setup.canonical.abstract_state["params"]}
        return setup.initialize(checkpoints.restore(step, wanted)["params"])
    return setup.canonical.load(checkpoints.restore(step, setup.canonical.abstract_state))


def _describe(setup: Setup) -> dict[str, Any]:
    """What a checkpoint says about the program that wrote it."""
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {
        "mesh": axis_sizes(setup.mesh),
        "processes": jax.process_count(),
        "versions": {name: version(name) for name in libraries},
    }


class _Loop:
    """The steps of one attempt. The device always has a step to do: step n is dispatched, then n - 1 is read."""

    def __init__(
        self,
        *,
        setup: Setup,
        data: TrainingData,
        checkpoints: Checkpoints,
        record: Callable[..., None],
        reporter: Reporter,
        preemption: Preemption,
        meta: dict[str, Any],
    ) -> None:
        self.setup, self.data, self.checkpoints, self.meta = setup, data, checkpoints, meta
        self.record, self.reporter, self.preemption = record, reporter, preemption
        self.evaluation = Evaluation(setup, data)
        self.throughput = Throughput(setup, data.sizes)

    def run(self, state: State, start: int, total_steps: int) -> State:
        """From the state after step `start` to that after the last step."""
        train, checkpoint = self.setup.run.train, self.setup.run.checkpoint

        def make_batch(step: int) -> Any:
            return make_train_batch(self.setup, self.data.train, self.data.sizes, step)

        with Prefetcher(make_batch, first_step=start, depth=self.setup.run.data.prefetch) as batches:
            if start < total_steps:
                batch = batches.get(start)
                train_step = self._compile(state, batch)
            self.throughput.begin(start)
            unread: tuple[int, Metrics] | None = None
            for step in range(start + 1, total_steps + 1):
                state, metrics = train_step(state, batch)
                if step < total_steps:
                    batch = batches.get(step)
                if unread is not None:
                    self._read(*unread, batches)
                unread = step, metrics
                preempted = self.preemption.requested_at(step)
                evaluates = step == total_steps or (train.eval_every is not None and step % train.eval_every == 0)
                saves = (
                    step == total_steps
                    or preempted
                    or (checkpoint.every_steps is not None and step % checkpoint.every_steps == 0)
                )
                if not (evaluates or saves):
                    continue
                self._read(*unread, batches)
                unread = None
                if evaluates and not preempted:
                    self._evaluate(state, step)
                if saves:
                    self._save(state, step)
                if preempted:
                    self._stop(step)
                self.throughput.begin(step, batches.wait_seconds)
        self.checkpoints.wait()
        self.record("finished", step=total_steps)
        return state

    def _compile(self, state: State, batch: Any) -> Callable[..., Any]:
        self.checkpoints.warm_up()
        begin = time.perf_counter()
        compiled = make_train_step(self.setup).lower(state, batch).compile()
        memory = compiled.memory_analysis()
        seconds = time.perf_counter() - begin
        self.record("compiled", seconds=seconds, temp_bytes=memory.temp_size_in_bytes if memory else None)
        self.reporter.message(f"compiled the step in {seconds:.1f} s")
        return compiled

    def _read(self, step: int, metrics: Metrics, batches: Prefetcher) -> None:
        """Waits for a step and reports it."""
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            self.record("spike", step=step, cause=f"loss {values['loss']}, gradient norm {values['grad_norm']}")
            raise DivergedError(
                f"step {step}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}; the last "
                "checkpoint is kept. Lower AdamW.learning_rate or lengthen its warmup, and start from an earlier step"
            )
        train = self.setup.run.train
        if step % train.log_every == 0 or step == 1:
            optimizer: Any = train.optimizer
            tokens = self.data.sizes.tokens(step)
            record = {
                "step": step,
                "tokens": tokens,
                **{name: value for name, value in values.items() if name != "target_tokens"},
                "learning_rate": optimizer.learning_rate_at(self.setup.run, step, tokens),
                **self.throughput.measure(step, batches.wait_seconds),
            }
            self.reporter.log(record)

    def _evaluate(self, state: State, step: int) -> None:
        for name, loss, tokens in self.evaluation.losses(state["params"]):
            self.reporter.evaluated(name, step, loss, tokens=tokens)

    def _save(self, state: State, step: int) -> None:
        begin = time.perf_counter()
        meta = {**self.meta, "tokens": self.data.sizes.tokens(step), "samples": self.data.sizes.first_sample(step)}
        self.checkpoints.save(step, self.setup.canonical.store(state), meta)
        self.record("saved", step=step, seconds=time.perf_counter() - begin)

    def _stop(self, step: int) -> None:
        self.checkpoints.wait()
        cause = self.preemption.cause or "another process was asked to stop"
        self.record("preempted", step=step, cause=cause)
        raise PreemptedError(f"stopped after step {step} ({cause}); everything is saved: the same command goes on")
