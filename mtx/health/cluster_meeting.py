"""How the processes of a job find each other before a run, and what is said where they do not.

Decides how long a process waits at each stage, and what it leaves in `RUN_DIR/doctor/` so that process 0 can name those
that it waits for. What the processes tell each other goes over JAX's coordinator, which needs no device: a collective
that does not work is a finding, not the end of finding.

Invariant: a process that waits too long ends with exit code 2 and a reason, in a thread that no stuck call holds up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mtx.errors import UserError

FOLDER = "doctor"
WAITING = "waiting for the others"
"""The stage of who is not waited for."""
_VERDICT = "verdict.json"
_LOOK_S, _FAREWELL_S, _CONNECT_S = 0.5, 3.0, 3.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_MAX_NAMED = 8


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPv6]:PORT.

    Raises:
        UserError: It is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or (":" in host and not host.startswith("[")):
        raise UserError(f"MTX_COORDINATOR = {address!r}: HOST:PORT, or [ADDRESS]:PORT with an IPv6 address")
    return host.strip("[]"), int(port)


def find_proxies(environment: Mapping[str, str]) -> list[str]:
    """Variables that send gRPC, which JAX's processes meet by, through a proxy; none where `no_proxy` is `*`."""
    if "*" in (environment.get("no_proxy"), environment.get("NO_PROXY"), environment.get("no_grpc_proxy")):
        return []
    return [name for name in environment if name.lower() in _PROXIES and environment[name]]


def reach(address: str, timeout_s: float) -> None:
    """Waits until somebody listens at the coordinator's address.

    Raises:
        UserError: Nobody did for `timeout_s` seconds; says what went wrong last.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S):
                return
        except socket.gaierror as error:
            cause, cure = f"the name does not resolve ({error.strerror})", "give the hosts by names that all resolve"
        except TimeoutError:
            cause, cure = "no answer", "let the hosts reach each other: firewall, route, interface"
        except OSError as error:
            cause = error.strerror or str(error)
            cure = "see why process 0 is not there, and that no firewall refuses the port"
        if time.monotonic() > deadline:
            proxies = find_proxies(os.environ)
            text = f"; set here, and may mislead it: {', '.join(proxies)}" if proxies else ""
            raise UserError(
                f"host {socket.gethostname()} cannot reach process 0 at {address}: {cause}, for {timeout_s:g} s; "
                f"{cure}{text}"
            )
        time.sleep(_LOOK_S)


def own_address() -> str:
    """What this host's own name resolves to.

    Raises:
        UserError: To nothing. Gloo, which CPU devices of several processes need, then does not start.
    """
    name = socket.gethostname()
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        raise UserError(
            f"host {name}: its own name does not resolve ({error.strerror}); give it, in /etc/hosts or by DNS, "
            "the address by which the others reach it"
        ) from None


class Watch:
    """Ends this process where a stage takes too long, or where process 0 has given up."""

    def __init__(
        self,
        run_dir: Path | None,
        *,
        process: int,
        count: int,
        meeting: str,
        timeout_s: float,
        complain: Callable[[str], None],
    ) -> None:
        """Starts watching.

        Args:
            run_dir: Where the processes tell their stage; None: nowhere.
            meeting: Tells this attempt's files from those of others: the coordinator's address.
            timeout_s: Of each stage.
            complain: Shows why this process ends.

        Raises:
            UserError: The run directory cannot be written.
        """
        self._complain = complain
        self._folder = None if run_dir is None else run_dir / FOLDER
        self._process, self._count, self._meeting, self._timeout_s = process, count, meeting, timeout_s
        self._entered = time.monotonic()
        self._born, self.stage, self._lock = time.time(), "start", threading.Lock()
        self._over = threading.Event()
        self._old = self.notes()  # of an attempt before, where the coordinator's address stays the same
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                if process == 0:
                    (self._folder / _VERDICT).unlink(missing_ok=True)
            self.enter("starting")
        except OSError as error:
            raise UserError(f"--run-dir {run_dir}: host {socket.gethostname()}: {error.strerror}") from None
        threading.Thread(target=self._watch, daemon=True).start()

    def enter(self, stage: str, **more: Any) -> None:
        """Begins a stage, whose time counts from now. `more` stands in this process's file, for all to read."""
        with self._lock:
            self.stage, self._entered = stage, time.monotonic()
        if self._folder is not None:
            note = {"meeting": self._meeting, "host": socket.gethostname(), "born": self._born, "stage": stage, **more}
            path = self._folder / f"{self._process}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(note), encoding="utf-8")
            part.replace(path)

    def fail(self, message: str) -> None:
        """Lets process 0 know that this process ends, and why; as process 0, all others."""
        self._over.set()
        if self._folder is not None:
            self.enter("failed", failure=message)
        if self._process == 0:
            self._announce(message)

    def leave(self, message: str) -> None:
        """As `fail`, and ends the process at once: at a usual exit JAX waits for the others."""
        self.fail(message)
        self._leave(message)

    def notes(self) -> dict[int, dict[str, Any]]:
        """What the processes of this attempt last wrote."""
        return {} if self._folder is None else _read_notes(self._folder, self._meeting, range(self._count))

    def end(self) -> None:
        """Stops watching and takes this process's file away."""
        self._over.set()
        if self._folder is not None:
            (self._folder / f"{self._process}.json").unlink(missing_ok=True)
            if self._process == 0:
                (self._folder / _VERDICT).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it; the last one removes it
                self._folder.rmdir()

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(_LOOK_S):
            looks += 1
            message = self._look_at_others(looks) if self._process == 0 else self._look_at_first()
            if message is not None and not self._over.is_set():
                if self._process == 0:
                    self._announce(message)
                self._leave(message)

    def _look_at_others(self, looks: int) -> str | None:
        """On process 0: why all should end."""
        if self._waited_s() > self._timeout_s:
            return f"{self.stage}: not done in {self._timeout_s:g} s; {describe_late(self.notes(), self._count)}"
        if looks % 4 or self._count == 1:
            return None
        new = [note for process, note in self.notes().items() if note != self._old.get(process)]
        return "; ".join([note["failure"] for note in new if "failure" in note][:_MAX_NAMED]) or None

    def _look_at_first(self) -> str | None:
        """On the others: why this one should end. It gives process 0, which knows more, time to say so first."""
        message = self._read_verdict()
        if message is None and self._waited_s() > self._timeout_s + _FAREWELL_S:
            message = f"{self.stage}: not done in {self._timeout_s:g} s; the output of process 0 may say who is missing"
        where = f"process {self._process} on host {socket.gethostname()}"
        return None if message is None else f"{where}: {message}"

    def _waited_s(self) -> float:
        with self._lock:
            return time.monotonic() - self._entered

    def _announce(self, message: str) -> None:
        """Only so does everybody end with the same code: when process 0 has gone, JAX aborts the others."""
        if self._folder is not None and self._count > 1:
            path = self._folder / _VERDICT
            path.with_suffix(".part").write_text(json.dumps({"meeting": self._meeting, "message": message}))
            path.with_suffix(".part").replace(path)
            time.sleep(_FAREWELL_S)

    def _read_verdict(self) -> str | None:
        if self._folder is None:
            return None
        try:
            verdict = json.loads((self._folder / _VERDICT).read_text(encoding="utf-8"))
            fresh = (self._folder / _VERDICT).stat().st_mtime > self._born
        except (OSError, ValueError):
            return None
        return str(verdict["message"]) if fresh and verdict["meeting"] == self._meeting else None

    def _leave(self, message: str) -> None:
        self._complain(message)
        os._exit(UserError.exit_code)


def describe_late(notes: Mapping[int, Mapping[str, Any]], count: int) -> str:
    """Which of `count` processes those are that the others wait for.

    Args:
        notes: Process -> what it last wrote; empty: nothing is known.
    """
    if not notes:
        return "with --run-dir on a shared file system it would be known which processes are missing"
    missing = [process for process in range(count) if process not in notes]
    if missing:
        seen = sorted({str(note["host"]) for note in notes.values()})
        return (
            f"{len(missing)} of {count} processes have not begun, or see another run directory: "
            f"{_shorten(missing)}; begun have those on {_shorten(seen)}"
        )
    stages: dict[str, list[str]] = {}
    for process, note in sorted(notes.items()):
        stages.setdefault(str(note["stage"]), []).append(f"process {process} on {note['host']}")
    fewest = sorted(stages.items(), key=lambda item: (item[0] == WAITING, len(item[1])))
    return "; ".join(f"at {stage!r}: {_shorten(who)}" for stage, who in fewest)


def _shorten(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    more = len(texts) - _MAX_NAMED
    return ", ".join(texts[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read_notes(folder: Path, meeting: str, processes: Iterable[int]) -> dict[int, dict[str, Any]]:
    found = {}
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    for process in processes:
        if f"{process}.json" not in names:
            continue
        try:
            note = json.loads((folder / f"{process}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # just replaced or taken away; the next look sees it
            continue
        if note.get("meeting") == meeting:
            found[process] = note
    return found


class Channel:
    """JAX's coordinator as a board that all processes write to and read from. Needs `start_process` before."""

    def __init__(self, *, process: int, count: int, timeout_s: float) -> None:
        self._process, self._count, self._timeout_ms, self._number = process, count, int(timeout_s * 1000), 0
        self._client: Any = None
        if count > 1:
            # JAX offers these calls nowhere else; its own multihost code and Orbax take them from here too.
            from jax._src import distributed

            self._client = distributed.global_state.client

    def gather(self, value: Any) -> list[Any] | None:
        """The JSON values of all processes, in their order, on process 0; None elsewhere. Waits for all."""
        if self._client is None:
            return [value]
        self._number += 1
        folder = f"mtx/doctor/{self._number}"
        self._client.key_value_set(f"{folder}/{self._process}", json.dumps(value))
        self.wait()
        if self._process:
            return None
        rows = {int(key.rpartition("/")[2]): json.loads(text) for key, text in self._client.key_value_dir_get(folder)}
        return [rows[process] for process in range(self._count)]

    def tell(self, value: Any) -> Any:
        """What process 0 gives, on all processes."""
        if self._client is None:
            return value
        self._number += 1
        key = f"mtx/doctor/{self._number}"
        if self._process == 0:
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._client.blocking_key_value_get(key, self._timeout_ms))

    def wait(self) -> None:
        """Returns when all have come here."""
        if self._client is not None:
            self._number += 1
            self._client.wait_at_barrier(f"mtx/doctor/{self._number}", self._timeout_ms)
