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

from mtx.config.statements import read_text
from mtx.config.values import format_value
from mtx.errors import UserError
from mtx.health.goodput import Goodput, measure_goodput
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
    journal: list[Record]
    goodput: Goodput
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
        last = self.training[-1] if self.training else {}
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
            "attempts": sum(event["event"] == "start" for event in self.journal),
            "finished": bool(self.journal) and self.journal[-1]["event"] == "finished",
            "goodput": self.goodput.fraction,
            **dataclasses.asdict(self.goodput),
            "other_seconds": self.goodput.other_seconds,
        }


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
    config_text = (run_dir / "config.gin").read_text(encoding="utf-8")
    return History(
        name=run_dir.resolve().name,
        training=training,
        evaluations=evaluations,
        journal=journal,
        goodput=measure_goodput(journal, training, undone),
        config_text=config_text,
        # Grammar only: the config of an old run may have keys that this version does not know.
        config={b.key: format_value(b.value) for b in read_text(config_text, "config.gin").bindings},
        samples=read_records(run_dir / "samples.jsonl"),
    )


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
