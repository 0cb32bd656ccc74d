"""What a person sees while a run goes on: one live line on a terminal, plain lines anywhere else. On stderr.

Decides the wording of progress; the numbers are those of the metrics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mtx.reports.units import format_count, format_duration


def describe_progress(record: Mapping[str, Any], total_steps: int) -> str:
    """The line of a logged step: step 40/2000  loss 6.2031  12.3k tokens/s  MFU 41.2%  data wait 0.3%  ETA 4m 05s."""
    parts = [f"step {record['step']}/{total_steps}", f"loss {record['loss']:.4f}"]
    if record.get("tokens_per_second") is not None:
        parts.append(f"{format_count(record['tokens_per_second'])} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    seconds = record.get("step_seconds")
    if seconds:
        if record.get("data_wait_seconds") is not None:
            parts.append(f"data wait {record['data_wait_seconds'] / seconds:.1%}")
        parts.append(f"ETA {format_duration(seconds * (total_steps - record['step']))}")
    return "  ".join(parts)


def describe_evaluation(name: str, step: int, loss: float) -> str:
    """The line of an evaluation, with the perplexity where it is a number worth reading."""
    perplexity = f"  perplexity {math.exp(loss):.4g}" if loss < 100 else ""
    return f"step {step}  {name} loss {loss:.4f}{perplexity}"


class PlainProgress:
    """A line per logged step, for log files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def log(self, record: Mapping[str, Any]) -> None:
        """Prints a line of training."""
        self.message(describe_progress(record, self._total_steps))

    def evaluated(self, name: str, step: int, loss: float) -> None:
        """Prints a line of evaluation."""
        self.message(describe_evaluation(name, step, loss))

    def message(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)

    def rewind(self, step: int) -> None:
        """Lines that were printed stay."""

    def close(self) -> None:
        """Nothing stays open."""


class LiveProgress:
    """One line that is redrawn at each logged step; evaluations and messages stay above it."""

    def __init__(self, total_steps: int, start_step: int, console: Console) -> None:
        self._total_steps = total_steps
        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,  # a refreshing thread would take a core from a run on a laptop
        )
        self._task = self._progress.add_task("starting", total=total_steps, completed=start_step)
        self._progress.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Redraws the line."""
        description = describe_progress(record, self._total_steps)
        self._progress.update(self._task, completed=record["step"], description=description, refresh=True)

    def evaluated(self, name: str, step: int, loss: float) -> None:
        """Prints a line of evaluation above."""
        self.message(describe_evaluation(name, step, loss))

    def message(self, text: str) -> None:
        """Prints a line above."""
        self._progress.console.print(text, markup=False, highlight=False)

    def rewind(self, step: int) -> None:
        """Draws the bar back to a step."""
        self._progress.update(self._task, completed=step, description=f"back to step {step}", refresh=True)

    def close(self) -> None:
        """Leaves the last line on the terminal."""
        self._progress.stop()


def open_progress(*, total_steps: int, start_step: int) -> PlainProgress | LiveProgress:
    """Live where stderr is a terminal that can redraw a line, plain elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(total_steps, start_step, console)
    return PlainProgress(total_steps)
