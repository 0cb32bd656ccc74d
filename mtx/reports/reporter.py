"""Everything a run tells the outside while it trains, behind one object.

Decides who hears what: `metrics.jsonl` and TensorBoard get records, the terminal gets lines about them.

Invariant: process 0 writes and the others do nothing, so the loop need not ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtx.jsonl import say
from mtx.reports.incidents import describe_event
from mtx.reports.metrics import MetricsFile
from mtx.reports.tensorboard import TensorBoard
from mtx.reports.terminal import LiveProgress, PlainProgress, open_progress


class Reporter:
    """The sinks of one attempt of a run. Used as a context manager, it closes them at the end."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        is_primary: bool = True,
        waits: bool = False,
    ) -> None:
        """Opens the sinks.

        Args:
            run_dir: The run directory, which exists.
            total_steps: Last step of the run.
            start_step: Step that this attempt goes on from; what was recorded of later ones is moved aside.
            quiet: Whether nothing is printed.
            is_primary: Whether this is process 0.
            waits: Whether no file is touched before `begin`; until then there are messages only.

        Raises:
            UserError: The metrics cannot be written.
        """
        self._sinks: list[MetricsFile | TensorBoard] = []
        self._terminal: PlainProgress | LiveProgress | None = None
        self._run_dir, self._start_step, self._is_primary = run_dir, start_step, is_primary
        if not waits:
            self.begin()
        if is_primary and not quiet:
            self._terminal = open_progress(total_steps=total_steps, start_step=start_step)

    def begin(self) -> None:
        """Opens the files; what was recorded of steps after `start_step` is moved aside.

        Raises:
            UserError: The metrics cannot be written.
        """
        if self._is_primary:
            self._sinks.append(MetricsFile(self._run_dir, start_step=self._start_step, warn=self.warn))
            self._sinks.append(TensorBoard(self._run_dir, start_step=self._start_step, warn=self.warn))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, record: dict[str, Any]) -> None:
        """Reports a step of training.

        Args:
            record: `step`, `loss` and further numbers as Python floats and ints, None where unknown; the keys of
                `metrics.jsonl`.
        """
        for sink in self._sinks:
            sink.log(record)
        if self._terminal:
            self._terminal.log(record)

    def evaluated(self, name: str, step: int, loss: float, **more: float | int | None) -> None:
        """Reports the loss on a validation set after `step`; `more` numbers go to the records alone."""
        for sink in self._sinks:
            sink.log({"step": step, "eval": name, "loss": loss, **more})
        if self._terminal:
            self._terminal.evaluated(name, step, loss)

    def message(self, text: str) -> None:
        """Prints a line for a person."""
        if self._terminal:
            self._terminal.message(text)

    def told(self, event: str, **fields: Any) -> None:
        """Prints what happened: an event of the journal and its fields, in the words of the report."""
        self.message(f"{event.replace('_', ' ')}: {describe_event({'event': event, **fields})}")

    def rewind(self, step: int) -> None:
        """Goes back: what was recorded of the steps after `step` is moved aside, as at a resume.

        Raises:
            UserError: The metrics cannot be written.
        """
        for sink in self._sinks:
            sink.rewind(step)
        if self._terminal:
            self._terminal.rewind(step)

    def warn(self, text: str) -> None:
        """Prints a line that a quiet run prints, too."""
        if self._terminal:
            self._terminal.message(text)
        else:
            say(text)

    def close(self) -> None:
        """Closes all sinks."""
        for sink in self._sinks:
            sink.close()
        if self._terminal:
            self._terminal.close()
