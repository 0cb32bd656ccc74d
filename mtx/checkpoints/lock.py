"""One run at a time in a run directory.

Decides who may write there. The lock is the kernel's, on the open file: it is gone with the process, however that ends.
What the file says is for people.

Invariant: the file is never deleted. A second one of the same name could be locked beside the first.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtx.errors import UserError

NAME = "lock"

_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def hold_lock(run_dir: Path, *, report: Callable[[str], None], option: str = "--run-dir") -> Iterator[None]:
    """Holds `RUN_DIR/lock` for the body. For one process of a run; the lock of a child that it forks is the same one.

    Args:
        run_dir: Exists.
        report: Told where the file system has no locks; the body runs all the same.
        option: Of the command, that names another directory.

    Raises:
        UserError: Another process holds it.
        OSError: No file can be written there.
    """
    handle = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            user = _describe(os.pread(handle, 4096, 0))
            raise UserError(f"{run_dir} is in use by {user}: stop it, or give another {option}") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            report(f"{run_dir}: its file system has no locks: nothing keeps a second run out of it ({error.strerror})")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        os.close(handle)


def _describe(content: bytes) -> str:
    """Who wrote a lock file. It may be half written, by a process that just took the lock."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on host {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
