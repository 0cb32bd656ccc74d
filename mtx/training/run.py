"""The story of a run: open its directory, begin or restore and prove it, train, go back where it spikes, until it ends.

Decides the order of things, and that all processes decide alike. What a step is, and what happens between steps, is in
`loop.py`; what an attempt must repeat of the one before it, in `proof.py`.

Invariant: of a run that goes on nothing changes before all that can be refused has been checked and its first step is
proven (the journal and signs of life aside), and what a run computes depends on its config, its data ledger and its
step alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from mtx.checkpoints.drift import Drift
from mtx.checkpoints.run_directory import RunDirectory, choose_step, digest_config
from mtx.config.checks import require_training_data
from mtx.config.layout import check_layout, resolve_mesh
from mtx.config.reader import Config
from mtx.data import ledger
from mtx.data.course import in_force
from mtx.data.entry import Entry
from mtx.data.samples import Sources
from mtx.data.training import TrainingData, open_training_data
from mtx.errors import DivergedError, UserError
from mtx.health import faults
from mtx.health.deadline import Deadline
from mtx.health.journal import Journal, read_journal
from mtx.health.preemption import Preemption
from mtx.health.spikes import Spike, SpikeDetector
from mtx.health.startup import Startup
from mtx.health.stragglers import Stragglers
from mtx.health.watch import Watch
from mtx.jsonl import say
from mtx.mesh import make_mesh
from mtx.planning.forecast import CALIBRATION, Forecast, forecast
from mtx.reports.reporter import Reporter
from mtx.sharding import axis_sizes
from mtx.training.digest import Digester
from mtx.training.loop import Loop, Surroundings
from mtx.training.resume import Checked, all_follow_first, check, note, prove_first_step, restore
from mtx.training.state import Setup, State


@dataclass(frozen=True)
class Trained:
    """A run after its last step. Its state is in its last checkpoint."""

    directory: RunDirectory
    setup: Setup


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: str = "auto",
    accept: frozenset[str] = frozenset(),
    quiet: bool = False,
    startup: Startup | None = None,
) -> Trained:
    """Trains, or goes on where the run directory stands, until the last step.

    Args:
        config: The run.
        run_dir: Made where it does not exist.
        resume: `auto` (the newest checkpoint that verifies), `never`, or the number of a step.
        accept: Fields whose change against the checkpoint's config is agreed to, such as `Train.seed`.
        quiet: Whether nothing is printed.
        startup: Has counted what came before; None: that is not told apart.

    Raises:
        UserError: The config does not fit the data, the devices or the run directory, or the resumed run does not
            repeat what it did.
        CheckpointError: There are checkpoints and none verifies, or one restores to other arrays than were saved.
        DivergedError: The loss spiked, and the tries are used up.
        PreemptedError: The process was asked to stop; everything is saved.
        StalledError: A device computes wrongly, or another process is lost.
    """
    run, startup = config.run, startup or Startup()
    require_training_data(run)
    counts = resolve_mesh(run.mesh, jax.device_count())
    check_layout(run, counts, config.provenance)
    setup = Setup(run, make_mesh(counts))
    sources = Sources()
    deadline = None if run.train.stop_before is None else Deadline(run.train.stop_before)
    with ExitStack() as stack:
        directory = _open_directory(config, run_dir, resume, sources, stack)
        attempt = _Attempt(config, setup, directory, sources, stack, startup, deadline=deadline, quiet=quiet)
        attempt.run(resume, accept)
    return Trained(directory, setup)


def _open_directory(config: Config, run_dir: Path, resume: str, sources: Sources, stack: ExitStack) -> RunDirectory:
    """The run directory, made where there is none, and locked until the stack is closed."""
    exists = RunDirectory.exists(run_dir)
    all_follow_first(lambda: None)  # before it is made, or others see half of it
    if exists and resume == "never":
        raise UserError(
            f"{run_dir} is the directory of a run; --resume auto goes on with it, another --run-dir does not"
        )
    if not exists:
        if resume not in ("auto", "never"):
            raise UserError(f"--resume {resume}: {run_dir} does not exist")
        data = open_training_data(config.run, sources=sources)

        def create() -> None:
            data.train.read(0)  # a damaged store leaves no directory behind
            RunDirectory.create(run_dir, config.text(), data.tokenizer_files)

        all_follow_first(create)
    directory = RunDirectory.open(run_dir)
    all_follow_first(lambda: stack.enter_context(directory.lock(report=say)))
    return directory


class _Attempt:
    """What one process does in one attempt at a run."""

    def __init__(
        self,
        config: Config,
        setup: Setup,
        directory: RunDirectory,
        sources: Sources,
        stack: ExitStack,
        startup: Startup,
        *,
        deadline: Deadline | None,
        quiet: bool,
    ) -> None:
        self.config, self.setup, self.directory, self.sources, self.stack = config, setup, directory, sources, stack
        self.startup = startup
        self.is_primary, self.quiet = jax.process_index() == 0, quiet
        self.reporter: Reporter | None = None
        checkpoint, health = config.run.checkpoint, config.run.health
        process, processes = jax.process_index(), jax.process_count()
        self.journal = Journal(directory.path, config_digest=digest_config(config), process=process, warn=self.warn)
        stack.callback(self.journal.close)
        self.watch = stack.enter_context(
            Watch(
                directory.path,
                process=process,
                num_processes=processes,
                hang_timeout_s=health.hang_timeout_s,
                peer_timeout_s=health.peer_timeout_s,
                record=self.journal.record,
            )
        )
        self.checkpoints = stack.enter_context(
            directory.checkpoints(
                keep_last=checkpoint.keep_last,
                keep_every=checkpoint.keep_every,
                keep_best=checkpoint.keep_best,
                report=self.warn,
                on_stored=lambda step, seconds, size: self.record(
                    "stored", step=step, seconds=seconds, size_bytes=size
                ),
                on_failed=lambda step, cause: self.record("save_failed", step=step, cause=cause),
                reach=faults.reach,
            )
        )
        stack.push(self.watch.heed)
        # From here on: what asks to stop while a checkpoint is verified is honoured after the first step.
        self.preemption = stack.enter_context(Preemption(process=process, num_processes=processes, deadline=deadline))
        self.detector = self._make_detector()
        self.entries: Sequence[Entry] = []
        self.data: TrainingData

    def _make_detector(self) -> SpikeDetector:
        health = self.config.run.health
        return SpikeDetector(
            score=health.spike_score,
            window=health.spike_window,
            patience=health.spike_patience,
            max_nonfinite=health.max_nonfinite,
        )

    def record(self, event: Any, **fields: Any) -> None:
        """Tells the journal, once for all processes."""
        if self.is_primary:
            self.journal.record(event, **fields)

    def _happened(self, event: Any, **fields: Any) -> None:
        """Tells the journal and a person."""
        self.record(event, **fields)
        if self.reporter is not None:
            self.reporter.told(event, **fields)

    def tell(self, text: str) -> None:
        """Tells a person, who may want it quiet."""
        if self.reporter is not None:
            self.reporter.message(text)
        elif self.is_primary and not self.quiet:
            say(text)

    def warn(self, text: str) -> None:
        """Tells a person in any case."""
        if self.reporter is not None:
            self.reporter.warn(text)
        else:
            say(text)

    def run(self, resume: str, accept: frozenset[str]) -> None:
        """From where the run stands to its end."""
        step = None if resume == "never" else choose_step(self.checkpoints, None if resume == "auto" else int(resume))
        meta: Mapping[str, Any] = {} if step is None else self.checkpoints.meta(step)
        start = step or 0
        checked = check(self.config, self.directory, self.sources, step=step, meta=meta, accept=accept)
        self.data, self.entries = checked.data, checked.entries
        train = self.config.run.train
        total = self.data.sizes.step_at_tokens(train.tokens or 0) if train.steps is None else train.steps
        self._introduce(step, total, checked.drift)
        self.startup.end("config, data and directory")
        digester = Digester(self.setup.mesh)
        begin = time.perf_counter()
        state, proven = self._restore_or_initialize(digester, step)
        seconds = time.perf_counter() - begin
        self.startup.end("initialize" if step is None else "restore")
        if checked.drift.accepted:
            self.detector = self._make_detector()  # what was usual of other data or another program says nothing
        self.reporter = self.stack.enter_context(
            Reporter(
                self.directory.path,
                total_steps=total,
                start_step=start,
                quiet=self.quiet,
                is_primary=self.is_primary,
                waits=True,
            )
        )
        if start >= total:  # no step is left to prove it by
            self._begin(checked, step)
        loop = Loop(self.setup, digester, self._surroundings(), total, self._describe())

        def on_first_step(values: Mapping[str, Any], program: str) -> None:
            self.startup.end("first step")
            if step is not None:
                now = {**loop.meta, "program": program}
                proven.update(prove_first_step(self.setup, checked, step=step, meta=meta, now=now, values=values))
            self._begin(checked, step)
            self.record("started", step=start + 1, seconds=self.startup.seconds, parts=self.startup.parts)
            if step is not None:
                self.record("resumed", step=step, seconds=seconds, proof=proven)
            if proven:
                self.tell("proven: " + ", ".join(f"{what} {how}" for what, how in proven.items()))

        stopped = loop.run(state, start, self.data, self.detector, on_first_step)
        del state  # it was consumed; after a roll-back there is room for one only
        while stopped is not None:
            start = self._go_back(*stopped)
            state, _ = self._restore_or_initialize(digester, start if start in self.checkpoints.steps() else None)
            stopped = loop.run(state, start, self.data, self.detector, lambda values, program: None)
            del state
        self.watch.enter("finish", total)
        self.record("finished", step=total)

    def _begin(self, checked: Checked, step: int | None) -> None:
        """Makes what was checked and proven the run's own: from here on files change. Collective."""
        assert self.reporter is not None
        note(self.config, self.directory, checked, step=step or 0)
        if checked.drift.accepted:
            self.record("accepted", step=step or 0, changes=checked.drift.accepted)
        if step is not None:
            self.checkpoints.set_aside_after(step)
        self.reporter.begin()

    def _introduce(self, step: int | None, total: int, drift: Drift) -> None:
        """Says what is going to be trained, and where."""
        declared = jax.tree.leaves(self.setup.definition.whole.params)
        parameters, kind = sum(leaf.size for leaf in declared), jax.devices()[0].device_kind
        mesh = {axis: size for axis, size in axis_sizes(self.setup.mesh).items() if size > 1}
        self.record(
            "start",
            step=step or 0,
            devices=self.setup.mesh.size,
            processes=jax.process_count(),
            device_kind=kind,
            mesh=mesh,
            parameters=parameters,
        )
        layout = ", ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"
        self.tell(f"{self.directory.path}: {parameters:,} parameters, {total:,} steps, on {kind} ({layout})")
        if step is not None:
            self.tell("\n  ".join([f"goes on from step {step}", *drift.free, *drift.accepted]))

    def _surroundings(self) -> Surroundings:
        health = self.config.run.health
        compares = jax.process_count() > 1 and health.straggler_every is not None
        assert self.reporter is not None
        return Surroundings(
            checkpoints=self.checkpoints,
            record=self.record,
            reporter=self.reporter,
            preemption=self.preemption,
            watch=self.watch,
            startup=self.startup,
            stragglers=Stragglers(ratio=health.straggler_ratio, record=self.record) if compares else None,
            forecast=self._forecast(),
        )

    def _forecast(self) -> Forecast | None:
        """What the planner expects of these devices."""
        file, mesh = os.environ.get(CALIBRATION), self.setup.mesh
        kind = mesh.devices.flat[0].device_kind
        return forecast(self.config.run, axis_sizes(mesh), kind, None if file is None else Path(file))

    def _describe(self) -> dict[str, Any]:
        """What every checkpoint says about the program that wrote it."""
        libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
        return {
            "config_digest": digest_config(self.config),
            "config": self.config.text(),
            "mesh": axis_sizes(self.setup.mesh),
            "processes": jax.process_count(),
            "device_kind": self.setup.mesh.devices.flat[0].device_kind,
            "cores": os.cpu_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "versions": {name: version(name) for name in libraries},
        }

    def _restore_or_initialize(self, digester: Digester, step: int | None) -> tuple[State, dict[str, str]]:
        if step is None:
            self.watch.enter("initialize", 0)
            return self.setup.initialize(), {}
        self.watch.enter("restore", step)
        if "spikes" in (meta := self.checkpoints.meta(step)):
            self.detector.restore(meta["spikes"])
        return restore(self.setup, self.checkpoints, digester, step)

    def _go_back(self, spike: Spike, reached: int) -> int:
        """Undoes the steps from a spike on, and those before it up to a checkpoint; their data are skipped.

        Returns:
            The step to go on from.

        Raises:
            DivergedError: The tries are used up.
        """
        self._happened("spike", step=reached, cause=spike.cause)
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        if saved and saved[0] >= spike.first_step:
            raise DivergedError(
                f"step {reached}: {spike.cause}. No checkpoint is older than that, so there is nothing to go back to. "
                "Lower AdamW.learning_rate or lengthen its warmup, and start a new run"
            )
        self.checkpoints.set_aside_after(spike.first_step - 1)
        start = (self.checkpoints.latest_verified() or 0) if saved else 0
        most = self.config.run.health.max_rollbacks

        def count_tries() -> None:
            tries = 0
            for event in read_journal(self.directory.path):
                if event["event"] == "accepted":
                    tries = 0  # it is another run since
                elif event["event"] == "rollback" and event["step"] == start:
                    tries += 1
            if tries >= most:
                raise DivergedError(
                    f"step {reached}: {spike.cause}. The tries from step {start} are used up (Health.max_rollbacks = "
                    f"{most}), so the run ends; its checkpoints are kept. Lower AdamW.learning_rate or lengthen its "
                    "warmup, and start from an earlier step (--resume STEP)"
                )

        all_follow_first(count_tries)
        entry = ledger.skip(self.entries, start, reached, spike.cause)
        skipped = self.data.sizes.first_sample(reached) - self.data.sizes.first_sample(start)
        self.entries = in_force([*self.entries, entry])
        if self.is_primary:
            ledger.append(self.directory.path, entry)
        self.data = open_training_data(self.config.run, self.entries, self.sources)
        self.detector = self._make_detector()
        assert self.reporter is not None
        self.reporter.rewind(start)
        self._happened("rollback", step=start, from_step=reached, skipped_samples=skipped, cause=spike.cause)
        return start
