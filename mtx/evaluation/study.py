"""The study: points one after another, what each gave kept for ever, a table after every one.

    STUDY_DIR/study.jsonl     a line per point that has ended, appended, never changed
    STUDY_DIR/study.json      the whole document (`study_document`), written anew after each point
    STUDY_DIR/points/NAME/    what a point's process wrote: its config, its run directory, its output

Decides the order, what is run at all, and what is never run again: a point whose config has a line already.

Invariant: a kill at any moment loses the point that runs and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mtx.config import layout, render, schema
from mtx.config.axes import MESH_AXES
from mtx.config.statements import nearest
from mtx.config.study import Plan as StudyPlan
from mtx.config.study import Point
from mtx.errors import UserError
from mtx.evaluation import study_row
from mtx.evaluation.study_probe import Machine, probe
from mtx.evaluation.study_run import Limits, Outcome, make_partial, measure
from mtx.jsonl import LineWriter, read_records
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS
from mtx.planning.plan import Plan, make_plan, usable_bytes

POINTS, RECORDS, DOCUMENT = "points", "study.jsonl", "study.json"
MARGIN = 1.1
"""What a plan may exceed the memory by before a point is not even tried: plans of memory are off by so much."""

Environment = Callable[[int | None], Mapping[str, str]]
"""From a number of simulated CPU devices, or None for those that there are, to the environment of a process."""


@dataclass
class Task:
    """A point, the devices it takes, its plan, and what became of it.

    Attributes:
        point: Size, layout and config.
        digest: Names what is computed, and on which kind of devices.
        machine: Where it is planned for, or has run; None: not known.
        run: With a mesh of counts; None where it does not fit.
        plan: None where there is none.
        record: Its line of `study.jsonl`.
        reason: Why it cannot be run.
        waits: Whether that is for want of devices alone.
    """

    point: Point
    digest: str
    machine: Machine | None = None
    run: schema.Run | None = None
    plan: Plan | None = None
    record: Mapping[str, Any] | None = None
    reason: str | None = None
    waits: bool = False

    @property
    def folder(self) -> str:
        """Of its files, below POINTS."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.point.name).strip('-.')}-{self.digest[:6]}"

    @property
    def runs(self) -> bool:
        """Whether it is still to be run."""
        return self.record is None and self.reason is None


@dataclass
class Place:
    """Where a study lives and runs.

    Attributes:
        folder: Of the study.
        environment: Of its processes.
        simulated: Devices of a mesh with -1, if devices are simulated; None: not said.
        machines: What was found, by the number of simulated devices.
        launcher: Target and options of `python -m launch` that start the processes of a point; empty: one here.
        launched: Devices of those processes together; None: those of one process here.
    """

    folder: Path
    environment: Environment
    simulated: int | None = None
    machines: dict[int | None, Machine] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    launched: int | None = None

    def machine(self, count: int | None) -> Machine:
        """Measured once. Args: count: Of simulated devices; None: those that there are."""
        if count not in self.machines:
            found = probe(self.environment(count), simulated=count is not None)
            self.machines[count] = found if self.launched is None else replace(found, num_devices=self.launched)
        return self.machines[count]


def make_tasks(
    plan: StudyPlan, place: Place, *, constants: Constants | None = None, retry: bool = False, only_plan: bool = False
) -> list[Task]:
    """All points with their plans and what is known of them already.

    Args:
        constants: Of the time model; None: those that are shipped.
        retry: Whether points that have failed are to be run again.
        only_plan: Plan for `Cluster.gpu` where a config names one, whatever the devices here.
    """
    simulates = plan.study.simulated or place.simulated is not None
    records = {record["config_digest"]: record for record in read_records(place.folder / RECORDS)}
    tasks = []
    for point in plan.points:
        if point.refused:
            tasks.append(Task(point, "refused", reason=point.refused))
            continue
        task = Task(point, _digest(point.config.run, simulates))
        record = records.get(task.digest)
        task.record = None if record is not None and retry and record["failure"] else record
        cluster = _find_cluster(task, place, simulates=simulates, only_plan=only_plan)
        try:
            _plan(task, cluster, constants)
        except UserError as error:
            task.reason, task.waits = str(error), False
        tasks.append(task)
    return tasks


def _digest(run: schema.Run, simulates: bool) -> str:
    values = [line.split("  #")[0] for line in render.dump(run, {}).splitlines() if not line.startswith("#")]
    return hashlib.blake2b("\n".join([*values, f"{simulates}"]).encode(), digest_size=8).hexdigest()


def _find_cluster(task: Task, place: Place, *, simulates: bool, only_plan: bool) -> Cluster:
    """The devices of a point: those that it ran on, those that are wished for, or those that there are.

    Raises:
        UserError: There is no telling.
    """
    run = task.point.config.run
    sizes = [getattr(run.mesh, axis) for axis in MESH_AXES]
    named, is_open = math.prod(max(1, size) for size in sizes), -1 in sizes
    if task.record is not None:
        try:
            task.machine = Machine(**task.record["machine"])
        except TypeError as error:
            raise UserError(
                f"{place.folder / RECORDS}: written by another version ({error}); give another --out"
            ) from None
        return Cluster.of(task.machine.gpu, task.record["devices"])
    wishes = run.cluster.gpu is not None and not simulates
    if only_plan and wishes:
        return _wanted_cluster(run, (run.cluster.gpus or named) if is_open else named)
    count = (place.simulated or named) if is_open else named
    task.machine = place.machine(count if simulates else None)
    there = task.machine.num_devices
    if is_open and not simulates:
        count = there
    if count > there or (place.launcher and count < there):  # a launch has all of its devices
        task.reason, task.waits = f"needs {count} devices, and here are {there}", True
        if wishes:
            task.machine = None
            return _wanted_cluster(run, count)
    return Cluster.of(task.machine.gpu, count)


def _plan(task: Task, cluster: Cluster, constants: Constants | None) -> None:
    """Lays a point out on its devices and plans it.

    Raises:
        UserError: It does not fit them.
    """
    run = task.point.config.run
    mesh = layout.resolve_mesh(run.mesh, cluster.num_gpus)
    layout.check_layout(run, mesh, task.point.config.provenance)
    task.run = replace(run, mesh=mesh, train=replace(run.train, batch_ramp=None))
    task.plan = make_plan(Case.of(task.run, cluster, check=False), constants, calibrated=constants is not None)
    has = usable_bytes(cluster.gpu)
    if task.record is None and not task.waits and task.plan.memory.total > MARGIN * has:
        needs = f"{task.plan.memory.total / 2**30:.1f} GiB of a device that has {has / 2**30:.1f} GiB"
        task.reason = f"by its plan it takes {needs}"


def _wanted_cluster(run: schema.Run, num_gpus: int) -> Cluster:
    """The cluster that a config looks ahead to.

    Raises:
        UserError: Its GPU is unknown.
    """
    wanted, gpu = run.cluster, GPUS.get(str(run.cluster.gpu))
    if gpu is None:
        raise UserError(f"Cluster.gpu = {wanted.gpu!r}: no such GPU; {nearest(str(wanted.gpu), GPUS)}")
    nic = None if wanted.nic_gbps is None else wanted.nic_gbps * 1e9 / 8
    return Cluster.of(gpu, num_gpus, domain=wanted.nvlink_domain, nic_bandwidth=nic)


def play(plan: StudyPlan, tasks: Sequence[Task], place: Place, tell: Callable[[str], None]) -> Iterator[Task]:
    """Runs what is to be run; yields each point when it has ended and its line is on the disk.

    Args:
        tell: Told a sentence before and after each point.
    """
    study = plan.study
    limits = Limits(warmup_steps=study.warmup_steps, steps=study.steps, seconds=60 * study.minutes)
    waiting, taken = [task for task in tasks if task.runs], list[float]()
    for number, task in enumerate(waiting):
        assert task.machine is not None
        assert task.plan is not None
        each = sum(taken) / len(taken) if taken else limits.seconds
        left = each * (len(waiting) - number) / 60
        about = "at most" if not taken else "about"
        tell(f"point {number + 1} of {len(waiting)}: {task.point.name}; {about} {left:.1f} minutes to go")
        outcome = _run(task, place, limits)
        taken.append(outcome.measured.seconds if outcome.measured is not None else each)
        task.record = {
            "time": time.time(),
            "config_digest": task.digest,
            "name": task.point.name,
            "devices": task.plan.num_gpus,
            "run_dir": f"{POINTS}/{task.folder}/run",
            "machine": asdict(task.machine),
            **outcome.as_json(),
        }
        writer = LineWriter(place.folder / RECORDS)
        written = writer.append(task.record, durable=True)
        writer.close()
        if not written:
            raise UserError(f"{place.folder / RECORDS}: the disk is full; make room, and the same command goes on")
        yield task


def _run(task: Task, place: Place, limits: Limits) -> Outcome:
    assert task.run is not None
    assert task.machine is not None
    assert task.plan is not None
    count = task.plan.num_gpus
    environment = dict(place.environment(count if task.machine.simulated else None))
    if not task.machine.simulated and count < task.machine.num_devices:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(task.machine.num_devices))))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:count])
    run = make_partial(task.run, limits)
    folder = place.folder / POINTS / task.folder
    return measure(run, folder, limits, environment=environment, launcher=place.launcher)


def make_document(plan: StudyPlan, tasks: Sequence[Task], place: Place, *, name: str, config: str) -> dict[str, Any]:
    """The document of `study_document`, without its calibration."""
    rows = [_row(task, plan) for task in tasks]
    machines = [*place.machines.values(), *(task.machine for task in tasks if task.machine is not None)]
    machine = max(machines, key=lambda machine: machine.num_devices) if machines else None
    ended = [task.record["time"] for task in tasks if task.record is not None]
    study = plan.study
    return {
        "version": 1,
        "name": name,
        "config": config,
        "ended": max(ended) if ended else None,
        "machine": None if machine is None else {**asdict(machine), "in_table": machine.in_table},
        "simulated": any(machine.simulated for machine in machines),
        "conventions": dict(study_row.CONVENTIONS),
        "settings": {"steps": study.steps, "warmup_steps": study.warmup_steps, "minutes": study.minutes},
        "counts": {
            status: sum(row["status"] == status for row in rows) for status in ("measured", "failed", "waiting")
        },
        "calibration": None,
        "points": rows,
    }


def _row(task: Task, plan: StudyPlan) -> dict[str, Any]:
    record: Mapping[str, Any] = task.record or {}
    measured, failure = record.get("measured"), record.get("failure")
    if task.reason is not None and not task.waits:
        failure = failure or "misfit"
    row = {
        "name": task.point.name,
        "size": task.point.size,
        "layout": task.point.layout,
        "config_digest": task.digest,
        "status": "measured" if measured else "failed" if failure else "waiting",
        "failure": failure,
        "reason": record.get("reason") or task.reason,
        "run_dir": record.get("run_dir"),
        "simulated": task.machine is not None and task.machine.simulated,
        **study_row.describe_run(task.run or task.point.config.run, task.plan, is_sound=not task.point.refused),
        "plan": None,
        "measured": measured,
        "achieved": None,
        "error": None,
    }
    if task.plan is not None:
        row["plan"] = study_row.describe_plan(task.plan)
        if measured is not None and task.machine is not None:
            achieved = study_row.describe_achieved(task.plan, measured, plan.study.tokens)
            kind = "data sheet" if task.machine.in_table else "measured matmul"
            row["achieved"] = {**achieved, "peak_kind": None if achieved["peak_tflops"] is None else kind}
            row["error"] = study_row.describe_error(row["plan"], measured)
    return row


def write_document(document: Mapping[str, Any], folder: Path) -> Path:
    """Writes `study.json`, whole or as it was; its path."""
    path = folder / DOCUMENT
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path
