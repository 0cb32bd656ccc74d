"""The manifest of a checkpoint: what was saved, and the size and digest of every file that holds it.

Decides what makes a checkpoint whole, without JAX or Orbax, so that any machine can check one. It neither writes nor
reads arrays. Orbax stores no checksum of the data and restores a flipped byte without a word: hence this file.

Invariant: it is written after every other file of the step, and no byte of it or of them can change unnoticed.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.errors import CheckpointError

NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ArrayEntry:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    `files` are named by their path below the step's directory, `arrays` by their path in the state
    (`params/layers/w`). `meta` is whatever the run wanted to know at resume: config digest, tokens, layout, versions.
    """

    step: int
    saved_at: str
    meta: dict[str, Any]
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileEntry]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size_bytes for entry in self.files.values())


def list_files(step_dir: Path) -> dict[str, int]:
    """Size in bytes of every file below `step_dir`, by its path there."""
    paths = sorted(path for path in step_dir.rglob("*") if path.is_file())
    return {path.relative_to(step_dir).as_posix(): path.stat().st_size for path in paths}


def digest_files(step_dir: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and digest of files below `step_dir`, which are flushed to the disk first."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest_file(step_dir / name, flush=True), names)))


def write(
    step_dir: Path,
    *,
    step: int,
    meta: Mapping[str, Any],
    arrays: Mapping[str, ArrayEntry],
    files: Mapping[str, FileEntry],
) -> Manifest:
    """Writes the manifest of the files that `digest_files` digested, through to the disk.

    Raises:
        OSError: They are not the files that are there.
    """
    if {name: entry.size_bytes for name, entry in files.items()} != list_files(step_dir):
        raise OSError(f"{step_dir}: other files than those that were digested")
    for folder in [step_dir, *(path for path in step_dir.rglob("*") if path.is_dir())]:
        flush_directory(folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = Manifest(step=step, saved_at=now, meta=dict(meta), arrays=dict(arrays), files=dict(files))
    with (step_dir / NAME).open("w", encoding="utf-8") as out:
        out.write(_encode(manifest))
        out.flush()
        os.fsync(out.fileno())
    flush_directory(step_dir)
    return manifest


def flush_directory(directory: Path) -> None:
    """Brings the names in a directory to the disk; that a file is there does not say that its name is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(step_dir: Path) -> Manifest:
    """Reads the manifest of a step.

    Raises:
        CheckpointError: It is missing, unreadable or not as it was written: its own digest is inside.
    """
    path = step_dir / NAME
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        manifest = Manifest(
            step=content["step"],
            saved_at=content["saved_at"],
            meta=content["meta"],
            arrays={
                name: ArrayEntry(shape=tuple(entry["shape"]), dtype=entry["dtype"])
                for name, entry in content["arrays"].items()
            },
            files={name: FileEntry(**entry) for name, entry in content["files"].items()},
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: damaged, it does not read as a manifest") from None
    if text != _encode(manifest):
        raise CheckpointError(f"{path}: damaged, its own digest does not fit")
    return manifest


def verify(step_dir: Path, *, process: int = 0, num_processes: int = 1) -> list[str]:
    """Reads the files that the manifest of a step lists and returns what is wrong, a line per problem.

    Files that the manifest does not list are nobody's evidence and change no array, so they are not a problem.

    Args:
        step_dir: A step.
        process: Which share of the files is read, where several processes verify a step together.
        num_processes: How many do.
    """
    try:
        manifest = read(step_dir)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if str(manifest.step) != step_dir.name:
        problems.append(f"{step_dir / NAME}: of step {manifest.step}, not of step {step_dir.name}")

    def check(name: str) -> str | None:
        path, expected = step_dir / name, manifest.files[name]
        try:
            size_bytes = path.stat().st_size
            if size_bytes != expected.size_bytes:
                return f"{path}: {size_bytes} bytes instead of {expected.size_bytes}"
            changed = _digest_file(path) != expected
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: unreadable ({error.strerror})"
        return f"{path}: its content changed (SHA-256 differs)" if changed else None

    sizes_bytes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        checked = pool.map(check, divide(sizes_bytes, num_processes)[process])
        return problems + [problem for problem in checked if problem is not None]


def divide(sizes_bytes: Mapping[str, int], num_processes: int) -> list[list[str]]:
    """The files of each process: about the same number of bytes for all, the same answer on all."""
    shares: list[list[str]] = [[] for _ in range(num_processes)]
    loads = [(0, process) for process in range(num_processes)]
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        load, process = heapq.heappop(loads)
        shares[process].append(name)
        heapq.heappush(loads, (load + max(1, sizes_bytes[name]), process))
    return shares


# Hashing and reading release the interpreter lock. Two readers fill two cores; more than eight only seek.
_READERS = max(2, min(8, os.cpu_count() or 2))


def _digest_file(path: Path, *, flush: bool = False) -> FileEntry:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")  # processors have instructions for it: 1.4 GB/s per core
        return FileEntry(size_bytes=file.tell(), sha256=digest.hexdigest())


def _encode(manifest: Manifest) -> str:
    """The one text of a manifest: the last key is the digest of the text without it."""
    content = dataclasses.asdict(manifest)
    body = json.dumps(content, indent=1, sort_keys=True)
    content["~sha256"] = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
