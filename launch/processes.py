"""The processes of one attempt: started, listened to, and ended, whatever state they are in.

Decides how output reaches the terminal and the logs, and how long a process may live when another one has failed. Does
not decide what an exit code means.

Invariant: when `Attempt.run` returns or raises, none of the processes runs any more; they do not outlive a killed
launcher either (Linux).
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from launch.job import LaunchError

POLL_S = 0.05
ENDED_WELL = (0, 4)
"""Codes after which the other processes are waited for without a limit: they may be saving."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Attempt:
    """Processes that end together."""

    def __init__(
        self,
        commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
        logs: Path,
        *,
        grace_s: float,
        signals: Sequence[int],
        say: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            commands: Words and environment of each process.
            logs: A new folder: `PROCESS.log` for the output of each.
            grace_s: Seconds to end by itself when another process has failed, and again after SIGTERM.
            signals: To pass on, the first as it is, another one as SIGKILL; a signal handler appends to it.
            say: Called with a line for a person.
        """
        self._commands, self._logs, self._grace_s, self._say = commands, logs, grace_s, say
        self._processes: list[_Process] = []
        self._forced: dict[int, str] = {}
        self._signals = signals

    def run(self, started: Callable[[list[int]], None]) -> tuple[list[int], list[int]]:
        """Runs all processes to their ends.

        Args:
            started: Called with the process ids.

        Returns:
            The exit codes of all, and of those that were not ended from here.

        Raises:
            LaunchError: The command cannot be executed.
            OSError: The logs cannot be written.
        """
        self._logs.mkdir(parents=True)
        try:
            with selectors.DefaultSelector() as selector:
                for index, (words, environment) in enumerate(self._commands):
                    prefix = f"[{index}] " if len(self._commands) > 1 else ""
                    process = _Process(words, environment, self._logs / f"{index}.log", prefix, self._say)
                    self._processes.append(process)
                    selector.register(process.output, selectors.EVENT_READ, process)
                started([process.pid for process in self._processes])
                self._watch(selector)
        finally:
            for process in self._processes:
                process.send(signal.SIGKILL)
            for process in self._processes:
                process.finish()
        codes = [process.code() for process in self._processes]
        own = [code for index, code in enumerate(codes) if index not in self._forced]
        return codes, own or codes

    def _watch(self, selector: selectors.BaseSelector) -> None:
        passed_on = 0
        deadline: float | None = None
        while any(process.runs() for process in self._processes):
            for key, _ in selector.select(POLL_S):
                if not key.data.read():
                    selector.unregister(key.fileobj)
            for number in self._signals[passed_on:]:
                passed_on += 1
                if passed_on > 1:
                    self._say("asked to stop again: the processes are killed")
                self._send_all(number if passed_on == 1 else signal.SIGKILL)
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
                self._say(f"process {index} is still there {self._grace_s:.0f} s later: {self._forced[index]}")
                process.send(number)

    def _send_all(self, number: int) -> None:
        for process in self._processes:
            process.send(number)


class _Process:
    """One process, in a process group of its own, and its output."""

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], log: Path, prefix: str, say: Callable[[str], None]
    ) -> None:
        self._prefix, self._say, self._rest = prefix.encode(), say, b""
        self._log = os.open(str(log), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._log_fails = False
        try:
            self._popen = subprocess.Popen(
                list(words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            os.close(self._log)
            raise LaunchError(f"{words[0]}: {error.strerror}; give the command after `--`") from None
        assert self._popen.stdout is not None
        self.output, self.pid = self._popen.stdout, self._popen.pid
        os.set_blocking(self.output.fileno(), False)

    def runs(self) -> bool:
        return self._popen.poll() is None

    def failed(self) -> bool:
        return self._popen.poll() not in (None, *ENDED_WELL)

    def code(self) -> int:
        return self._popen.wait()

    def send(self, number: int) -> None:
        """Sends a signal to the process and all it has started."""
        if self.runs() or number == signal.SIGKILL:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass
            except PermissionError:  # macOS, of a group of which only the dead leader is left
                pass

    def read(self) -> bool:
        """Passes on what there is to read; whether more can come."""
        try:
            data = os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self._write_log(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._print(lines)
        return bool(data)

    def finish(self) -> None:
        """Reads what is left, waits for the end and closes the files."""
        self._popen.wait()
        while not self.output.closed:
            try:
                data = os.read(self.output.fileno(), 1 << 16)
            except BlockingIOError:  # held open by something that left the process group
                data = b""
            self._write_log(data)
            if not data:
                self.output.close()
            self._rest += data
        if self._rest:
            self._print(self._rest.rstrip(b"\n").split(b"\n"))
            self._rest = b""
        os.close(self._log)

    def _print(self, lines: Sequence[bytes]) -> None:
        text = b"".join(self._prefix + line + b"\n" for line in lines)
        write(sys.stdout, text.decode("utf-8", "replace"))

    def _write_log(self, data: bytes) -> None:
        """A full disk costs the log what does not fit, never the run."""
        try:
            while data:
                data = data[os.write(self._log, data) :]
            self._log_fails = False
        except OSError as error:
            if not self._log_fails:
                self._say(f"the log misses what follows until it can be written again: {error.strerror}")
            self._log_fails = True


def write(stream: TextIO, text: str) -> None:
    """Writes to the terminal. Where that has gone, nobody is told any more, and the run goes on."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
