"""Processes as tests look at them."""

from pathlib import Path


def is_running(pid):
    """Whether a process runs or is stopped; a dead one that its parent has not asked about does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between the opening and the reading
        return False
