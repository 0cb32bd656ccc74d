"""The digests of a step's files, made by all processes together while the run trains.

Decides who digests which file, and how the digests come to process 0: as files in `STEP.saving.digests/`, since threads
that work beside the training step must not use its collectives.

    process 0        files.json: names and sizes of all files
    process i        digests its share --> i.json, or why it cannot
    process 0        waits for all of them; who cannot even say that it failed takes the folder away

Invariant: no process waits longer than the time limit, and not that long for one that can still say that it failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from mtx.checkpoints import manifest
from mtx.checkpoints.manifest import FileEntry

_POLL_SECONDS = 0.05
_FILES = "files.json"


def digest_together(
    step_dir: Path, folder: Path, *, process: int, num_processes: int, timeout_s: float
) -> dict[str, FileEntry]:
    """Digests the share of this process. All processes call it, each in its own time.

    Args:
        step_dir: The step, with all its files written.
        folder: For what the processes tell each other; not used by a single one.
        process: Index of this one.
        num_processes: Of the run.
        timeout_s: How long process 0 waits for others after its own share, and they for its list of files.

    Returns:
        On process 0 the entries of all files, elsewhere of the share.

    Raises:
        OSError: A file cannot be read, or another process failed.
        TimeoutError: Another process did not come.
    """
    if num_processes == 1:
        return manifest.digest_files(step_dir, manifest.list_files(step_dir))
    if process == 0:
        _put(folder / _FILES, manifest.list_files(step_dir))
    sizes_bytes = _get(folder / _FILES, timeout_s)
    entries = manifest.digest_files(step_dir, manifest.divide(sizes_bytes, num_processes)[process])
    if process != 0:
        files = {name: dataclasses.asdict(entry) for name, entry in entries.items()}
        _put(folder / f"{process}.json", {"files": files})
        return entries
    deadline = time.monotonic() + timeout_s
    for other in range(1, num_processes):
        part = _get(folder / f"{other}.json", deadline - time.monotonic())
        if "error" in part:
            raise OSError(part["error"])
        entries |= {name: FileEntry(**entry) for name, entry in part["files"].items()}
    return entries


def tell_failure(folder: Path, process: int, cause: str) -> None:
    """Says to process 0 that this one cannot give its part, and why."""
    try:
        _put(folder / f"{process}.json", {"error": cause})
    except OSError:  # a full disk: taking the folder away needs no room
        with contextlib.suppress(OSError):  # it is gone already
            folder.rename(folder.with_name(f"{folder.name}.gone"))


def _put(path: Path, content: Any) -> None:
    """Writes a file that others see whole or not at all."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)


def _get(path: Path, timeout_s: float) -> Any:
    """What another process put, or puts soon."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise OSError("another process could not write") from None
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} of another process did not come within {timeout_s:.0f} s")
        time.sleep(_POLL_SECONDS)
