"""What a run directory tells about its run, read for a report.

Decides the key figures. It reads files only, so that the report of a run needs no JAX, no GPU and no checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.checkpoints import manifest
from mtx.config.statements import read_text
from mtx.config.values import format_value
from mtx.errors import CheckpointError, UserError
from mtx.health.goodput import Goodput, measure_goodput
from mtx.health.interval import Advice, advise_interval
from mtx.health.journal import read_journal
from mtx.jsonl import read_records
from mtx.reports.metrics import read_metrics, read_undone_metrics

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class History:
    """The records of one run."""

    name: str
    training: list[Record]
    """Training lines of `metrics.jsonl`."""
    evaluations: dict[str, list[Record]]
    """Evaluation lines by the name of the validation set."""
    undone: list[list[Record]]
    """Training lines of each resume or rollback that undid some."""
    journal: list[Record]
    goodput: Goodput
    advice: Advice | None
    """How far apart checkpoints should be; None before one was saved."""
    ledger: list[Record]
    """Sources of the data up to the newest checkpoint: `store digest samples tokens epochs skipped_samples`."""
    config_text: str
    config: dict[str, str]
    """Key to value, as written: `Model.num_layers` to `12`."""
    samples: list[Record]
    """`prompt` and `text` of what the model wrote, with `step` where it is known."""

    @property
    def parameters(self) -> int | None:
        """Number of parameters, where the journal's `start` says it."""
        return next((event["parameters"] for event in self.journal if event.get("parameters")), None)

    @property
    def start(self) -> Record:
        """The latest `start` event: machine, devices and mesh of the last attempt."""
        return next((event for event in reversed(self.journal) if event["event"] == "start"), {})

    def summarize(self) -> dict[str, Any]:
        """The key figures as JSON values; None where the run has not told them."""
        last, goodput = self.training[-1] if self.training else {}, self.goodput
        return {
            "name": self.name,
            "parameters": self.parameters,
            "step": last.get("step", 0),
            "tokens": last.get("tokens"),
            "loss": last.get("loss"),
            "validation": {name: lines[-1]["loss"] for name, lines in self.evaluations.items()},
            "best_validation": {name: _least(lines) for name, lines in self.evaluations.items()},
            "tokens_per_second": _median(self.training, "tokens_per_second"),
            "model_tflops_per_device": _median(self.training, "model_tflops_per_device"),
            "mfu": _median(self.training, "mfu"),
            "attempts": len(goodput.attempts),
            "finished": bool(goodput.attempts) and goodput.attempts[-1].ended == "finished",
            "failures": goodput.num_failures,
            "rollbacks": goodput.num_rollbacks,
            "mtbf_seconds": goodput.mtbf_seconds,
            "goodput": goodput.fraction,
            **{name: value for name, value in dataclasses.asdict(goodput).items() if name.endswith("_seconds")},
            "attempt_list": [dataclasses.asdict(attempt) for attempt in goodput.attempts],
            "checkpoint_advice": self._summarize_advice(),
            "data": self.ledger,
        }

    def _summarize_advice(self) -> dict[str, Any] | None:
        advice = self.advice
        if advice is None:
            return None
        best = None if advice.best_seconds is None else advice.steps(advice.best_seconds)
        return {**dataclasses.asdict(advice), "best_steps": best, "verdict": advice.verdict}


def read_history(run_dir: Path) -> History:
    """Reads the files of a run directory; those that the run has not written yet count as empty.

    Raises:
        UserError: It is no run directory.
    """
    if not (run_dir / "config.gin").is_file():
        raise UserError(f"{run_dir}: no run directory, it holds no config.gin; name the folder that `mtx train` made")
    lines = read_metrics(run_dir)
    training = [line for line in lines if "eval" not in line]
    evaluations: dict[str, list[Record]] = {}
    for line in lines:
        if "eval" in line:
            evaluations.setdefault(line["eval"], []).append(line)
    undone = [[line for line in batch if "eval" not in line] for batch in read_undone_metrics(run_dir)]
    journal = read_journal(run_dir)
    goodput = measure_goodput(journal, training, undone)
    config_text = (run_dir / "config.gin").read_text(encoding="utf-8")
    # Grammar only: the config of an old run may have keys that this version does not know.
    config = {b.key: b.value for b in read_text(config_text, "config.gin").bindings}
    return History(
        name=run_dir.resolve().name,
        training=training,
        evaluations=evaluations,
        journal=journal,
        undone=undone,
        goodput=goodput,
        advice=_advise(journal, training, goodput, config.get("Checkpoint.every_steps")),
        ledger=_read_ledger(run_dir),
        config_text=config_text,
        config={key: format_value(value) for key, value in config.items()},
        samples=read_records(run_dir / "samples.jsonl"),
    )


def _advise(journal: Sequence[Record], training: Sequence[Record], goodput: Goodput, every_steps: Any) -> Advice | None:
    """The advice on checkpoints from what was measured: medians, as the first save of an attempt compiles."""

    def median(event: str) -> float | None:
        seconds = [
            entry["seconds"] for entry in journal if entry["event"] == event and entry.get("seconds") is not None
        ]
        return statistics.median(seconds) if seconds else None

    save_seconds, step_seconds = median("saved"), _median(training, "step_seconds")
    if save_seconds is None or not step_seconds or not goodput.up_seconds:
        return None
    return advise_interval(
        save_seconds=save_seconds,
        stored_seconds=median("stored") or 0.0,
        step_seconds=step_seconds,
        up_seconds=goodput.up_seconds,
        num_failures=goodput.num_failures + goodput.num_rollbacks,
        every_steps=every_steps if isinstance(every_steps, int) else None,
    )


def _read_ledger(run_dir: Path) -> list[Record]:
    """The sources in the newest checkpoint that tells of them; damage is for `mtx checkpoint verify` to tell."""
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdecimal())
    for step in reversed(steps):
        try:
            ledger = manifest.read(run_dir / "checkpoints" / str(step)).meta.get("ledger")
        except CheckpointError:
            continue
        if ledger:
            return list(ledger["sources"])
    return []


def find_differences(histories: Sequence[History]) -> dict[str, list[str]]:
    """Config keys in which runs differ, with the value of each run ('' where it has none)."""
    keys = dict.fromkeys(key for history in histories for key in history.config)
    rows = {key: [history.config.get(key, "") for history in histories] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def points(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have a finite value under the key."""
    found = [(record["step"], record.get(key)) for record in records]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _least(lines: Sequence[Record]) -> float | None:
    return min((loss for _, loss in points(lines, "loss")), default=None)


def _median(records: Sequence[Record], key: str) -> float | None:
    """The median, which neither the first steps nor a pause moves."""
    values = [value for _, value in points(records, key)]
    return statistics.median(values) if values else None
