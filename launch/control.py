"""`python -m launch status | logs | stop | repeat`: what can be done with a job that was started.

Decides what is told of a job, from the files of its run directory. How it is asked and stopped, its target knows.

Invariant: nothing here changes a run directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import logs, registry, restarts
from launch.job import ATTEMPTS, LaunchError, newest_job, read_arguments
from launch.stream import say, writable

METRICS = "metrics.jsonl"
WIDEST = 48
"""Characters of a cell of the table of jobs."""
TAIL_BYTES = 1 << 17
"""Of a file's end, where its last lines are looked for."""
POLL_S = 0.5
TELL_S = 30.0
"""Between two words to somebody who waits."""

ACTIONS = {
    "status": "what your jobs do, or one of them",
    "logs": "what a job prints",
    "stop": "ask a job to save and end, and wait until it has",
    "repeat": "start a job again, with the arguments it was started with",
}


def add_arguments(action: str, parser: argparse.ArgumentParser) -> None:
    """To the parser of an action."""
    add = parser.add_argument
    if action == "repeat":
        text = "a job's name or run directory; its job.json, or the newest of several, says what is started"
        add("run_dir", metavar="NAME", help=text)
        add("--dry-run", action="store_true", help="print the command, and start nothing")
    elif action == "status":
        add("name", nargs="?", metavar="NAME", help="of a job, or its run directory; default: all jobs")
        add("--json", action="store_true", help="print JSON")
    else:
        add("name", metavar="NAME", help="of the job, or its run directory")
    if action == "logs":
        add("--follow", action="store_true", help="go on with what comes, over all attempts, until the job has ended")
        add("--attempt", metavar="N", help="default: the newest")
        add("--process", type=int, metavar="K", help="of this process alone, as it came; default: of all, prefixed")
        text = f"the last of them only; default: the whole attempt, with --follow {logs.FOLLOWED}"
        add("--lines", type=int, metavar="N", help=text)
    elif action == "stop":
        add("--kill", action="store_true", help="do not wait for a checkpoint: kill it")


def run(action: str, args: argparse.Namespace, launch: Callable[[Sequence[str]], int]) -> int:
    """Does it; the exit code.

    Args:
        launch: `python -m launch`, for a job that is repeated.

    Raises:
        LaunchError: There is no such job, or it cannot be asked.
    """
    try:
        code = _run(action, args, launch)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        raise LaunchError(f"{error.filename or action}: {error.strerror}") from None


def _run(action: str, args: argparse.Namespace, launch: Callable[[Sequence[str]], int]) -> int:
    if action == "status":
        return _show_status(args.name, as_json=args.json)
    if action == "repeat":
        return _repeat(args.run_dir, launch, dry_run=args.dry_run)
    record = registry.find(args.name)
    if action == "logs":
        return logs.show(record, attempt=args.attempt, process=args.process, lines=args.lines, follow=args.follow)
    return _stop(record, kill=args.kill)


def summary(record: registry.Record) -> dict[str, Any]:
    """What is known of a job: its record, its state, and what its run directory says; None: nothing.

    `checkpoint`: step of the newest complete one. `step`, `loss`: of the last logged step, `logged` when that was, in
    seconds since 1970. `attempts`: that were begun. `reason`: why the last one that has ended did.
    """
    try:
        state = registry.state(record)
    except LaunchError as error:
        state = f"unknown ({error})"
    folder = Path(record.run_dir)
    metrics = folder / METRICS
    steps = [line for line in _last_lines(metrics) if "loss" in line and "eval" not in line]
    started, reason = _attempts(folder / ATTEMPTS)
    return {
        "name": record.name,
        "target": record.target,
        "state": state,
        "run_dir": record.run_dir,
        "submitted": record.submitted,
        "checkpoint": restarts.newest_step(record.run_dir),
        "step": steps[-1].get("step") if steps else None,
        "loss": steps[-1].get("loss") if steps else None,
        "logged": metrics.stat().st_mtime if steps else None,
        "attempts": started,
        "reason": reason,
    }


def _show_status(name: str | None, *, as_json: bool) -> int:
    found = [summary(record) for record in (registry.list_records() if name is None else [registry.find(name)])]
    if as_json:
        _print(json.dumps(found, indent=1))
    elif not found:
        _print(f"no jobs in {registry.folder()}")
    elif name is not None:
        for field, value in _words(found[0]).items():
            _print(f"{field:<12}{value}")
    else:
        rows = [
            {key: value if key == "run dir" else _cut(value) for key, value in _words(job).items()} for job in found
        ]
        columns = list(rows[0])
        widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
        for row in [{column: column for column in columns}, *rows]:
            _print("  ".join(row[column].ljust(widths[column]) for column in columns).rstrip())
    return 0


def _words(job: dict[str, Any]) -> dict[str, str]:
    loss = job["loss"]
    shown = {
        "name": job["name"],
        "target": job["target"],
        "state": job["state"],
        "step": job["step"],
        "loss": f"{loss:.4g}" if isinstance(loss, float) else None,
        "logged": None if job["logged"] is None else f"{_duration(time.time() - job['logged'])} ago",
        "checkpoint": job["checkpoint"],
        "attempts": job["attempts"],
        "last end": job["reason"],
        "run dir": job["run_dir"],
    }
    return {key: "-" if value is None else " ".join(str(value).split()) for key, value in shown.items()}


def _cut(text: str) -> str:
    """What fits into a table; the status of one job shows the whole of it."""
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _attempts(path: Path) -> tuple[int, str | None]:
    """How many began, and why the last that has ended did."""
    started, reason = 0, None
    for event in _last_lines(path, 1 << 24):
        if event.get("event") == "started":
            started += 1
        elif event.get("event") == "ended":
            reason = event.get("reason")
    return started, reason


def _last_lines(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The objects, one a line, at the end of a file; a line that a crash has cut short is left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        say(f"{path}: {error.strerror}")
        return []
    objects = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def _stop(record: registry.Record, *, kill: bool) -> int:
    found = registry.state(record)
    if found.startswith(("ended", "lost")):
        say(f"job {record.name}: {found}; there is nothing to stop")
        return 0
    if not record.handle:
        raise LaunchError(f"job {record.name}: {found}; it cannot be stopped from here")
    registry.target_of(record).stop(record, signal.SIGKILL if kill else signal.SIGTERM)
    say(f"job {record.name}: " + ("killed" if kill else "asked to save and end; Ctrl-C stops only this waiting"))
    told = time.monotonic()
    while not (found := registry.state(record)).startswith(("ended", "lost")):
        if time.monotonic() > told + TELL_S:
            told = time.monotonic()
            say(f"job {record.name}: {found}; --kill does not wait for a checkpoint")
        time.sleep(POLL_S)
    newest = restarts.newest_step(record.run_dir)
    say(f"job {record.name}: {found}; newest checkpoint: {'none' if newest is None else f'step {newest}'}")
    return 0


def _repeat(run_dir: str, launch: Callable[[Sequence[str]], int], *, dry_run: bool) -> int:
    path = newest_job(Path(run_dir)) or newest_job(Path(registry.find(run_dir).run_dir))
    if path is None:
        raise LaunchError(f"{run_dir}: no job.json in its run directory: no launcher here has started it")
    folder, words = read_arguments(path)
    line = f"cd {shlex.quote(folder)} && {shlex.join([sys.executable, '-m', 'launch', *words])}"
    if dry_run:
        _print(line)
        return 0
    say(line)
    try:
        os.chdir(folder)
    except OSError as error:
        raise LaunchError(f"{folder}: {error.strerror}; the job was started there") from None
    return launch(words)


def _print(line: str) -> None:
    print(writable(line, sys.stdout))
