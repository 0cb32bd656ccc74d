"""A thread that looks after the process: it beats, and it ends a run that cannot go on, saying who is to blame.

In a synchronous run every process waits for the slowest, so one that is lost or stuck stops all of them, mostly inside
a collective that nothing can interrupt. Decides when that is so and how to leave: with all stacks in `RUN_DIR/stacks/`,
an event in the journal, and an exit code that starts the run again.

Process 0 watches all others; they watch process 0 and follow its verdict, which is in its last sign of life. So a
thousand processes cost a thousand small reads a second, and only while the run stands still.

Invariant: as long as the main thread makes progress, nothing that is read about others has any effect; and the thread
needs neither the main thread nor a device nor a working disk to end the process.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mtx.errors import StalledError, UserError
from mtx.health import faults
from mtx.health.heartbeat import Beat, Phase, set_aside, write_beat
from mtx.health.peers import Peers, describe, find_late
from mtx.jsonl import say

STACKS = "stacks"
TICK_S = 1.0
PATIENCE_S = 3.0
"""Without progress, before this process looks at others."""
LOST_S = 5.0
"""Without a sign of life of another process when something has failed here, such as a collective."""
LEADER_FIRST_S = 10.0
"""So much later than process 0 the others find by themselves that the run hangs."""
LINGER_S = 8.0
"""That process 0 stays for the others to see why it ends: with it goes JAX's coordinator, whose clients then abort."""
LEAVE_S = 15.0
"""That leaving may take, whatever disks do."""
LONG_PHASES = ("start", "initialize", "compile", "restore", "save", "finish")
"""These compile, or read and write whole checkpoints, and may take `LONG` times as long as others."""
LONG = 4


class Watch:
    """Watches over this process while open. To be opened before all that may hang, and closed after it.

    Leaving by an exception in a run of several processes tells the others, who end with the same exit code. Where the
    loss of a process caused it, this process ends here with that of `StalledError`. It never waits long for others at
    the exit of Python, where JAX has a barrier: `LINGER_S` after an exception it is gone.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        process: int,
        num_processes: int,
        hang_timeout_s: float,
        peer_timeout_s: float,
        record: Callable[..., Any],
    ) -> None:
        """Starts nothing yet.

        Args:
            run_dir: The run directory, which all processes share.
            process: Index of this process.
            num_processes: Processes of the run.
            hang_timeout_s: Seconds without progress after which the run ends; `LONG` times that in `LONG_PHASES`.
            peer_timeout_s: Seconds without a sign of life of a process after which the others end.
            record: `Journal.record` of this process.
        """
        self._run_dir, self._process, self._record = run_dir, process, record
        self._hang_timeout_s, self._peer_timeout_s = hang_timeout_s, peer_timeout_s
        self._others = [index for index in range(num_processes) if index != process]
        self._watched = self._others if process == 0 else [0]
        self._peers = Peers(run_dir, self._watched)
        self._host = socket.gethostname()
        self._place: tuple[Phase, int] = ("start", 0)
        self._seen: tuple[Phase, int] = self._place
        self._still_s = 0.0
        self._beats = 0
        self._said = False
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def enter(self, phase: Phase, step: int) -> None:
        """Says what the main thread does from now on. Every call counts as progress and costs next to nothing.

        Args:
            phase: See `Phase`.
            step: That is read, computed, waited for, evaluated or saved; before the first one, that of the checkpoint.
        """
        self._place = (phase, step)  # a new object each time, which is how the thread sees that there was a call
        faults.reach(phase, step)

    def __enter__(self) -> Watch:
        self._beat()
        self._thread.start()
        return self

    def heed(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finds out whether an exception on its way out comes from the loss of another process, and ends this one then.

        For `ExitStack.push`, above whatever waits for other processes when it is closed.
        """
        if error is None or self._error is not None:
            return
        self._error = error
        if _exit_code(error) == 1 and self._others:  # no mistake of the user's: the thread looks
            time.sleep(LOST_S + 3 * TICK_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.heed(kind, error, trace)
        code = 0 if error is None else _exit_code(error)
        self._closed.set()
        self._thread.join()
        self._see(0.0)
        why = ": ".join(filter(None, [type(error).__name__, str(error)]))  # Ctrl-C says nothing
        cause = f"{describe([self._own()])} ended with exit code {code}: {why}"
        self._beat(code, cause if error else None)
        if error is not None and self._others:
            threading.Thread(target=self._leave, args=(code,), name="leave", daemon=True).start()

    # In the thread.

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            # What is longer than two ticks was not lived through: the process was stopped, maybe with all others.
            elapsed_s, last = min(now - last, 2 * TICK_S), now
            self._see(elapsed_s)
            could_write = self._beat()
            if self._still_s >= PATIENCE_S or self._error is not None:
                self._judge(elapsed_s, could_write)
            else:
                self._peers.forgive()

    def _see(self, elapsed_s: float) -> None:
        """Sees where the main thread is, `elapsed_s` seconds after the last time."""
        place = self._place
        self._still_s = self._still_s + elapsed_s if place is self._seen else 0.0
        self._seen = place

    def _own(self, exit_code: int | None = None, cause: str | None = None) -> Beat:
        phase, step = self._seen
        return Beat(
            process=self._process,
            host=self._host,
            pid=os.getpid(),
            time=round(time.time(), 3),
            phase=phase,
            step=step,
            phase_seconds=round(self._still_s, 3),
            beat=self._beats,
            exit_code=exit_code,
            cause=cause,
        )

    def _beat(self, exit_code: int | None = None, cause: str | None = None) -> bool:
        """Gives a sign of life; whether it could be written. That it cannot ends no run."""
        self._beats += 1
        try:
            write_beat(self._run_dir, self._own(exit_code, cause))
        except OSError as error:
            if not self._said:
                say(f"mtx: process {self._process} cannot write its signs of life ({error}); the run goes on")
            self._said = True
            return False
        return True

    def _judge(self, elapsed_s: float, could_write: bool) -> None:
        """Ends the process if the run cannot go on."""
        self._peers.look(self._watched if self._error is None else self._others, elapsed_s)
        if not could_write:
            self._peers.forgive()  # others may not be able to, either
        for beat in self._peers.failed():
            self._end(beat.exit_code or 0, beat.cause or f"{describe([beat])} failed")
        limit_s = self._peer_timeout_s if self._error is None else min(LOST_S, self._peer_timeout_s)
        if silent := self._peers.silent(limit_s):
            self._end(StalledError.exit_code, f"no sign of life for {limit_s:g} s of {describe(silent)}", silent)
        elif self._still_s >= self._hang_timeout_s + (LEADER_FIRST_S if self._process else 0):
            self._judge_hang()

    def _judge_hang(self) -> None:
        """Ends the process if those that the run waits for had the time that their phases have."""
        self._peers.look(self._others, 0.0)
        running = [self._own(), *(beat for beat in self._peers.beats(self._others) if beat.exit_code is None)]
        late = find_late(running)
        for beat in late or running:
            if beat.phase_seconds < self._hang_timeout_s * (LONG if beat.phase in LONG_PHASES else 1):
                return
        cause = f"no progress for {self._still_s:.0f} s"
        if late:
            cause += f": the others wait for {describe(late)}"
        elif len(running) > 1:
            cause += ", and nobody is behind: a device or the network hangs under " + describe(running)
        else:
            cause += " in " + describe(running)
        self._end(StalledError.exit_code, cause, late or running)

    def _end(self, exit_code: int, cause: str, late: Sequence[Beat] = ()) -> NoReturn:
        """Ends the process, after telling a person, the other processes and, where it is this one's turn, the journal.

        Args:
            exit_code: Of this process, and of those that follow it.
            cause: A sentence.
            late: Whom it found to be late or lost; empty where it follows another process.
        """
        guard = threading.Timer(LEAVE_S, os._exit, (exit_code,))
        guard.daemon = True
        guard.start()
        try:
            if self._error is not None:
                traceback.print_exception(self._error)
            is_stalled = exit_code == StalledError.exit_code
            say(f"mtx: {cause}{'; start again from the last checkpoint' if is_stalled else ''}")
            self._beat(exit_code, cause)
            stacks = self._dump_stacks()
            # Process 0 decides for all. If it is the lost one, the journal is for whoever is the first to bury it.
            if late and (self._process == 0 or set_aside(self._run_dir, 0, stacks.with_suffix(".process-0.json"))):
                self._record("hang", cause=cause, late=[_summarize(beat) for beat in late])
            if self._process == 0:
                self._linger()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(exit_code)

    # When the process is to end.

    def _dump_stacks(self) -> Path:
        """Writes what every thread is doing into a file; where that cannot be, on stderr."""
        path = self._run_dir / STACKS / f"process-{self._process}-{_now()}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("x") as file:
                faulthandler.dump_traceback(file)
            say(f"mtx: the stacks of process {self._process} are in {path}")
        except OSError as error:
            say(f"mtx: {error}; the stacks of process {self._process}:")
            faulthandler.dump_traceback(sys.stderr)
        return path

    def _leave(self, exit_code: int) -> None:
        """Ends the process if it does not end by itself, as where others do not come to the barrier at its exit."""
        time.sleep(2 * TICK_S)
        if self._process == 0:
            self._linger()
        sys.stdout.flush()
        os._exit(exit_code)

    def _linger(self) -> None:
        """Waits until the others have seen that process 0 ends."""
        for _ in range(round(LINGER_S / TICK_S)):
            self._peers.look(self._others, TICK_S)
            if self._peers.are_gone(LOST_S):
                return
            time.sleep(TICK_S)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return error.exit_code if isinstance(error, UserError) else 1


def _summarize(beat: Beat) -> dict[str, Any]:
    return {
        "process": beat.process, "host": beat.host, "phase": beat.phase, "step": beat.step,
        "seconds": beat.phase_seconds,
    }  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
