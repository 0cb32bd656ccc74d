"""What a drill does to a run from outside: damaged files, a full disk, a disk that cannot be written.

Faults inside a process are those of `mtx.health.faults`. Decides nothing about what must come of a fault.

Invariant: mounts are made in a namespace of this process, so they vanish with it, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def largest_file(folder: Path) -> Path:
    """The file below a folder that holds the most bytes."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.stat().st_size, path))


def flip_byte(path: Path) -> None:
    """Flips a bit in the middle of a file; a second time restores it."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def truncate(path: Path) -> None:
    """Cuts a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def make_room_for_mounts() -> str | None:
    """Gives this process mounts of its own; to be called while it has one thread. Why it cannot; None: it can."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        user, group, is_root = os.geteuid(), os.getegid(), os.geteuid() == 0
        if libc.unshare(_CLONE_NEWNS | (0 if is_root else _CLONE_NEWUSER)) != 0:
            return f"no mount namespace ({os.strerror(ctypes.get_errno())})"
        if not is_root:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _mount("--make-rprivate", "/")
        with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "trial", 1 << 20):
            pass
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return f"no mounts: {_reason(error)}"
    return None


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size in memory, at a new folder.

    Raises:
        OSError: It cannot be mounted.
    """
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path))
    except subprocess.SubprocessError as error:
        raise OSError(_reason(error)) from None
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """A `small_disk` that nobody can write to for a while."""
    _mount("-o", "remount,ro", str(disk))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(disk))


def fill(disk: Path, free_bytes: int) -> Path:
    """Fills a disk up to so many free bytes; the file that does it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        status = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free_bytes))
    return ballast


def wait_until_stopped(pid: int, deadline: float) -> bool:
    """Waits until a process has come to a stop by SIGSTOP; whether it has before `deadline` (`time.monotonic`)."""
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "T":
            return True
        time.sleep(0.01)
    return False


def go_on(pid: int) -> None:
    """Lets a stopped process go on."""
    os.kill(pid, signal.SIGCONT)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True, timeout=30)


def _reason(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr).strip()
    return str(error)
