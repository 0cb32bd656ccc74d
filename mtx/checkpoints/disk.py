"""What an error says about the disk: whether a failed save is the disk's fault, and how to say so to a person.

Decides which errors a run survives: those of files and of other processes. Any other error is a bug and is raised.

Invariant: an error counts as the disk's only where the operating system named it.
"""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

# TensorStore raises ValueError: "RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']".
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


def is_disk_error(error: BaseException) -> bool:
    """Whether an error came from files, or from waiting for other processes (`TimeoutError` is an `OSError`)."""
    return isinstance(error, OSError) or _OS_ERROR_CODE.search(str(error)) is not None


def describe_error(error: BaseException, directory: Path, size_bytes: int) -> str:
    """One line for a person.

    Args:
        error: What was raised.
        directory: Where something was to be written.
        size_bytes: How much.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (match := _OS_ERROR_CODE.search(str(error))):
        code = int(match[1])
    if code == errno.ENOSPC:
        return describe_full(directory, size_bytes)
    if code == errno.EDQUOT:
        return f"the disk quota on {directory} is used up (needs about {_megabytes(size_bytes)})"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def has_room(directory: Path, size_bytes: int) -> bool:
    """Whether that much is free where `directory` is. Quotas do not show; a file system that does not say has room."""
    usage = shutil.disk_usage(directory)
    return usage.total == 0 or usage.free >= size_bytes


def describe_full(directory: Path, size_bytes: int) -> str:
    """How much room is missing, as a line for a person."""
    free = shutil.disk_usage(directory).free
    return f"no space left on {directory} (needs about {_megabytes(size_bytes)}, {_megabytes(free)} free)"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.{1 if size_bytes < 1e8 else 0}f} MB"
