"""The processes of one attempt: started, listened to, and ended, whatever state they are in.

Decides how output reaches the terminal and the logs, and how long a process may live when another one has failed. Does
not decide what an exit code means.

Invariant: when `Attempt.run` returns or raises, none of the processes runs any more; they do not outlive a killed
launcher either (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import stream
from launch.job import LaunchError

POLL_S = 0.05
LOOK_S = 1.0
"""Between two looks at what cannot be waited for: files of other hosts, the life line."""
ENDED_WELL = (0, 4)
"""Codes after which the other processes are waited for without a limit: they may be saving."""
ALL_LOG = "all.log"
"""Of an attempt: every line of every process, with its prefix, in the order of arrival."""

LONGEST_LINE = 1 << 16
"""Bytes after which a line is broken where lines of several processes are put together. A process's own log has all of
it as it came."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Start:
    """A process to start.

    Attributes:
        words: Program and arguments; no shell sees them.
        environment: The whole of it.
        name: Of its log, `NAME.log`; None: what it prints is logged where it runs.
        label: Tells its lines apart; empty: they come as they are.
        title: What it is called where it has neither label nor log.
        greeting: None: signals are sent to it. Else it starts processes on another host for us: this line is written
            to its standard input, then the names of signals, and an empty line every second as a sign of life.
        cores: That it runs on; empty: all it may.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    name: str | None
    label: str = ""
    title: str = ""
    greeting: str | None = None
    cores: Sequence[int] = ()


class Attempt:
    """Processes that end together."""

    def __init__(
        self,
        starts: Sequence[Start],
        logs: Path,
        *,
        grace_s: float,
        signals: Sequence[int],
        say: Callable[[str], None],
        second_kills: bool = True,
        collects: bool = True,
        find_trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Starts nothing yet.

        Args:
            logs: Folder of the logs, which holds none of the same names yet.
            grace_s: Seconds to end by itself when another process has failed, and again after SIGTERM.
            signals: To pass on, each as it is; a signal handler appends to it.
            say: Called with a line for a person.
            second_kills: Whether a second signal of a kind is passed on as SIGKILL.
            collects: Whether all lines go into a common log as well.
            find_trouble: Called every second; what it says, once, is a reason to end the attempt, as if a process had
                failed.
        """
        self._starts, self._logs, self._grace_s, self._say = starts, logs, grace_s, say
        self._second_kills, self._find_trouble, self._collects = second_kills, find_trouble, collects
        self._processes: list[Process] = []
        self._forced: dict[int, str] = {}
        self._signals = signals

    def run(self, started: Callable[[list[int]], None] = lambda pids: None) -> tuple[list[int], list[int]]:
        """Runs all processes to their ends.

        Args:
            started: Called with the process ids.

        Returns:
            The exit codes of all, and of those that were not ended from here.

        Raises:
            LaunchError: The command cannot be executed.
            OSError: The logs cannot be written.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        common = stream.Log(self._logs / ALL_LOG, self._say) if self._collects else None
        try:
            with selectors.DefaultSelector() as selector:
                for start in self._starts:
                    process = Process(start, self._logs, common, self._say)
                    self._processes.append(process)
                    selector.register(process.output, selectors.EVENT_READ, process)
                started([process.pid for process in self._processes])
                self._watch(selector)
        finally:
            for process in self._processes:
                process.send(signal.SIGKILL)
            for process in self._processes:
                process.finish()
            if common is not None:
                common.close()
        codes = [process.code() for process in self._processes]
        own = [code for index, code in enumerate(codes) if index not in self._forced]
        return codes, own or codes

    def _watch(self, selector: selectors.BaseSelector) -> None:
        passed_on, looked = 0, time.monotonic()
        deadline: float | None = None
        while any(process.runs() for process in self._processes):
            for key, _ in selector.select(POLL_S):
                if not key.data.read():
                    selector.unregister(key.fileobj)
            for number in self._signals[passed_on:]:
                passed_on += 1
                kill = self._second_kills and number in self._signals[: passed_on - 1]
                if kill:
                    self._say("asked to stop again: the processes are killed")
                self._send_all(signal.SIGKILL if kill else number)
            if time.monotonic() > looked + LOOK_S:
                looked = time.monotonic()
                for process in self._processes:
                    process.show_life()
                trouble = self._find_trouble() if deadline is None else None
                if trouble is not None:
                    self._say(trouble)
                    deadline = time.monotonic() + self._grace_s
            if deadline is None and any(process.failed() for process in self._processes):
                deadline = time.monotonic() + self._grace_s
            elif deadline is not None and time.monotonic() > deadline:
                deadline = time.monotonic() + self._grace_s
                self._force()

    def _force(self) -> None:
        """The next step towards the end of what still runs: SIGTERM, then SIGKILL, which stopped processes obey too."""
        for index, process in enumerate(self._processes):
            if process.runs():
                number = signal.SIGKILL if index in self._forced else signal.SIGTERM
                self._forced[index] = signal.Signals(number).name
                self._say(f"process {process.label} is still there {self._grace_s:.0f} s later: {self._forced[index]}")
                process.send(number)

    def _send_all(self, number: int) -> None:
        for process in self._processes:
            process.send(number)


class Process:
    """One process, in a process group of its own, and its output."""

    def __init__(self, start: Start, logs: Path, common: stream.Log | None, say: Callable[[str], None]) -> None:
        self.label = start.label or start.name or start.title or start.words[0]
        self._prefix, self._rest, self._common = f"[{start.label}] ".encode() if start.label else b"", b"", common
        self._log = None if start.name is None else stream.Log(logs / f"{start.name}.log", say)
        self._remote = start.greeting is not None
        try:
            self._popen = subprocess.Popen(
                list(start.words),
                env=dict(start.environment),
                stdin=subprocess.PIPE if self._remote else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                preexec_fn=lambda: _prepare(start.cores),
            )
        except OSError as error:
            if self._log is not None:
                self._log.close()
            raise LaunchError(f"{start.words[0]}: {error.strerror}; give the command after `--`") from None
        assert self._popen.stdout is not None
        self.output, self.pid = self._popen.stdout, self._popen.pid
        os.set_blocking(self.output.fileno(), False)
        if self._popen.stdin is not None:
            os.set_blocking(self._popen.stdin.fileno(), False)
            self._write(f"{start.greeting}\n")

    def runs(self) -> bool:
        return self._popen.poll() is None

    def failed(self) -> bool:
        return self._popen.poll() not in (None, *ENDED_WELL)

    def code(self) -> int:
        return self._popen.wait()

    def send(self, number: int) -> None:
        """Sends a signal to the process and all it has started."""
        if self._remote and number != signal.SIGKILL:
            self._write(f"{signal.Signals(number).name}\n")
        elif self.runs() or number == signal.SIGKILL:
            try:
                os.killpg(self.pid, number)  # of a remote one: the life line breaks, and its host ends it
            except ProcessLookupError:
                pass
            except PermissionError:  # macOS, of a group of which only the dead leader is left
                pass

    def show_life(self) -> None:
        """Tells a remote process that somebody still waits for it."""
        if self._remote and self.runs():
            self._write("\n")

    def _write(self, line: str) -> None:
        """To the standard input of what starts processes elsewhere. What does not listen any more is found out by its
        silence on the other end, or by its exit code."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._popen.stdin.write(line.encode())

    def read(self) -> bool:
        """Passes on what there is to read; whether more can come."""
        try:
            data = os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self._pass_on(data)
        return bool(data)

    def finish(self) -> None:
        """Reads what is left, waits for the end and closes the files."""
        self._popen.wait()
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        while not self.output.closed:
            try:
                data = os.read(self.output.fileno(), 1 << 16)
            except BlockingIOError:  # held open by something that left the process group
                data = b""
            self._pass_on(data)
            if not data:
                self.output.close()
        if self._rest:
            self._pass_on(b"\n", logged=False)
        if self._log is not None:
            self._log.close()

    def _pass_on(self, data: bytes, *, logged: bool = True) -> None:
        if logged and self._log is not None:
            self._log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LONGEST_LINE:
            lines.append(self._rest[:LONGEST_LINE])
            self._rest = self._rest[LONGEST_LINE:]
        text = b"".join(self._prefix + line + b"\n" for line in lines)
        if self._common is not None:
            self._common.write(text)
        stream.show(text.decode("utf-8", "replace"))


def _prepare(cores: Sequence[int]) -> None:
    """In the new process. Linux: a launcher that is killed takes its processes along."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if cores:
        os.sched_setaffinity(0, cores)
