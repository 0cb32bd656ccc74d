"""The jobs of this user, by name: one small file each, in $XDG_STATE_HOME/mtx/jobs (default ~/.local/state/mtx/jobs).

Decides when a name is taken, and how a loop that is a process of this user's is found and stopped. How jobs of a
scheduler are asked for, their targets know.

Invariant: a reader sees a whole record or none, and a name never passes from a job that lives to another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import restarts
from launch.job import ATTEMPTS, Job, LaunchError, newest_job, read
from launch.stream import say

HOST, PID, STARTED, ENDED = "host", "pid", "started", "ended"
"""What the handle of a process says."""
KILL_S = 10.0
"""That a loop has to end its processes by itself when it is to be killed."""


@dataclass(frozen=True)
class Record:
    """A job that was started.

    Attributes:
        name: Of the job.
        target: That started it: a module of `launch.targets`.
        run_dir: Its run directory, absolute.
        handle: By which the target finds it again.
        submitted: When it was, in seconds since 1970.
    """

    name: str
    target: str
    run_dir: str
    handle: dict[str, str]
    submitted: float


def folder() -> Path:
    """Where the records are. A relative $XDG_STATE_HOME does not count (XDG Base Directory Specification 0.8)."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state") / "mtx" / "jobs"


def register(job: Job, target: str, handle: Mapping[str, str]) -> None:
    """Keeps how a job is found again. A folder that cannot be written costs the name, never the run.

    Raises:
        LaunchError: A job of that name lives.
    """
    path = folder() / f"{job.name}.json"
    record = Record(job.name, target, os.path.abspath(job.run_dir), dict(handle), time.time())
    try:
        with _locked():
            refuse_taken(job.name, handle)
            _write(path, record)
    except OSError as error:
        say(
            f"{path} cannot be written ({error.strerror}): `stop` will not find this job, `status` and `logs` by its "
            "run directory only; give XDG_STATE_HOME a folder that can be written"
        )


def run_registered(job: Job, target: str, run: Callable[[], int]) -> int:
    """What `run` returns, the exit code of a loop in this process, which is found by the job's name meanwhile.

    Raises:
        LaunchError: A job of that name lives.
    """
    handle = process_handle()
    register(job, target, handle)
    how = "by a bug of the launcher"
    try:
        code = run()
        how = restarts.describe(code)
    except (LaunchError, OSError) as error:
        how = f"{restarts.describe(LaunchError.exit_code)}: {error}"
        raise
    finally:
        close(job, handle, how)
    return code


def wait_for(name: str, pid: int, seconds: float = 5.0) -> None:
    """Returns when process `pid` has registered the job of that name, or after that many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, LaunchError):
            if _read(folder() / f"{name}.json").handle.get(PID) == str(pid):
                return
        time.sleep(0.02)


def with_free_name(job: Job) -> Job:
    """The job, called NAME-2, NAME-3, ... where another run directory's job of its name lives: many a run directory is
    called `run`."""
    name, number = job.name, 1
    while True:
        path = folder() / f"{name}.json"
        try:
            other = _read(path)
            if os.path.realpath(other.run_dir) == os.path.realpath(job.run_dir) or not lives(other):
                break
        except (OSError, LaunchError):
            break
        number += 1
        name = f"{job.name[:60]}-{number}"
    return dataclasses.replace(job, name=name)


def close(job: Job, handle: Mapping[str, str], how: str) -> None:
    """Notes that a job has ended, and how, where nobody else could tell. A record of another job is left alone."""
    path = folder() / f"{job.name}.json"
    try:
        record = _read(path)
        if record.handle == dict(handle):
            _write(path, dataclasses.replace(record, handle={**handle, ENDED: how}))
    except (OSError, LaunchError):
        return  # it could not be written when the job began, which was told


def refuse_taken(name: str, handle: Mapping[str, str] | None = None) -> None:
    """Whether a name can be given to a new job.

    Args:
        handle: Of the job that asks: its own record does not keep it out.

    Raises:
        LaunchError: It cannot: a job of that name lives, or may live.
    """
    path = folder() / f"{name}.json"
    try:
        record = _read(path)
    except (OSError, LaunchError):
        return
    if handle is not None and record.handle == dict(handle):
        return
    if not lives(record):
        return
    found = state(record)
    raise LaunchError(
        f"a job of the name {name} is there: {found}, run directory {record.run_dir}; stop it (`python -m launch stop "
        f"{name}`), give --name another one, or, if you know that it has gone, remove {path}"
    )


def find(name: str) -> Record:
    """The job of a name, or the newest one of a run directory, which need not have a record.

    Raises:
        LaunchError: There is none.
    """
    records = list_records()
    for record in records:
        if record.name == name:
            return record
    here = [record for record in records if os.path.realpath(record.run_dir) == os.path.realpath(name)]
    if here:
        return max(here, key=lambda record: record.submitted)
    path = newest_job(Path(name))
    if path is not None:
        target, fields = read(path)
        return Record(str(fields["name"]), target, os.path.abspath(name), {}, path.stat().st_mtime)
    known = ", ".join(record.name for record in records[:20]) or "none"
    raise LaunchError(f"{name!r} is neither a job's name nor a run directory of a launcher; known names: {known}")


def list_records() -> list[Record]:
    """All jobs, by name. A file that is no record is told and left out."""
    records = []
    for path in sorted(folder().glob("*.json"), key=lambda path: path.stem):
        try:
            records.append(_read(path))
        except LaunchError as error:
            say(str(error))
        except FileNotFoundError:  # replaced or removed since
            continue
        except OSError as error:
            say(f"{path}: {error.strerror}")
    return records


def state(record: Record) -> str:
    """What a job does: "pending ...", "running ...", "ended ...", "lost ..." or "unknown ...".

    Raises:
        LaunchError: Its target cannot be asked.
    """
    if not record.handle:
        return f"unknown (no record of its launcher; see {ATTEMPTS})"
    return str(target_of(record).state(_newest(record)))


def _newest(record: Record) -> Record:
    """The record as it is now: its loop may have noted its end."""
    with contextlib.suppress(OSError, LaunchError):
        now = _read(folder() / f"{record.name}.json")
        if now.submitted == record.submitted:
            return now
    return record


def lives(record: Record) -> bool:
    """Whether a job runs, waits to, or may do so.

    Raises:
        LaunchError: Its target cannot be asked.
    """
    return not state(record).startswith(("ended", "lost"))


def target_of(record: Record) -> Any:
    """The module of a job's target.

    Raises:
        LaunchError: There is none of that name.
    """
    try:
        return importlib.import_module(f"launch.targets.{record.target}")
    except ModuleNotFoundError:
        raise LaunchError(f"job {record.name}: this version has no target {record.target!r}") from None


def process_handle() -> dict[str, str]:
    """How this process is found again, on this host or from another one."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: _started(os.getpid()) or ""}


def process_state(record: Record) -> str:
    """What a job does whose loop is a process of the user's."""
    handle = record.handle
    if not {HOST, PID, STARTED} <= handle.keys() or not handle[PID].isdecimal():
        return "unknown (its record does not say which process it is)"
    if ENDED in handle:
        return f"ended ({handle[ENDED]})"
    if handle[HOST] != socket.gethostname():
        return f"unknown (its loop is process {handle[PID]} of host {handle[HOST]}: ask there)"
    if _started(int(handle[PID])) != handle[STARTED]:
        return "lost (its loop was killed, or the machine was started again)"
    return "running"


def stop_process(record: Record, number: int) -> None:
    """Sends a signal to the loop of a job. SIGKILL: the loop is asked twice, after which it kills its processes and
    records that; it is killed only when it has not ended within `KILL_S`.

    Raises:
        LaunchError: It is not here, or has ended.
    """
    found = process_state(record)
    if found.startswith("unknown") and record.handle.get(HOST, socket.gethostname()) != socket.gethostname():
        raise LaunchError(
            f"job {record.name}: its loop is a process of host {record.handle[HOST]} and this is "
            f"{socket.gethostname()}; stop it there: `python -m launch stop {record.name}`"
        )
    if found != "running":
        raise LaunchError(f"job {record.name}: {found}; there is nothing to stop")
    pid = int(record.handle[PID])
    try:
        if number != signal.SIGKILL:
            os.kill(pid, number)
            return
        for _ in range(2):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)  # two of a kind at once are one
        deadline = time.monotonic() + KILL_S
        while _started(pid) == record.handle[STARTED]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)
    except ProcessLookupError:
        return  # ended meanwhile
    except PermissionError:
        raise LaunchError(f"job {record.name}: process {pid} belongs to another user") from None


def _started(pid: int) -> str | None:
    """When a process began, told so that another one of the same number differs; None: it is not there, or dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # the name before it can hold anything
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return None
    words = ["ps", "-o", "lstart=", "-p", str(pid)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout.decode("ascii", "replace").strip() or None


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Keeps others of this user from registering meanwhile."""
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(str(folder() / ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> Record:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        record = Record(**json.loads(text))
        handle = {str(key): str(value) for key, value in record.handle.items()}
        return Record(record.name, str(record.target), str(record.run_dir), handle, float(record.submitted))
    except (ValueError, TypeError, AttributeError):
        raise LaunchError(f"{path}: no record of a job; remove it") from None


def _write(path: Path, record: Record) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    descriptor = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=1)
            file.write("\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink()
        raise
