"""The data ledger of a run, `RUN_DIR/ledger.jsonl`: every data setting it ever had, each with the step it holds from.

Decides when a run gets a new entry, and what a damaged file is. Does not decide what follows from the entries
(`course.py`).

Invariant: the file only grows, is whole at any moment, and no byte of it can change unnoticed: each line carries a
digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtx.config import schema
from mtx.data.course import Course, in_force
from mtx.data.entry import Entry
from mtx.data.samples import Sources, shorten
from mtx.errors import UserError

NAME = "ledger.jsonl"
_SEAL = "digest"  # of the rest of the line


def read_entries(run_dir: Path) -> list[Entry]:
    """The entries of a run directory that hold, by rising step; none where there is no ledger yet.

    Raises:
        UserError: A line was changed since it was written.
    """
    path = run_dir / NAME
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().decode(errors="replace").removesuffix("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or record.pop(_SEAL, None) != _digest(record):
                raise ValueError("changed since it was written")
            entries.append(Entry.from_json(record))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: a damaged entry ({error}), and the data of the run follows from it: restore the "
                "file from a copy"
            ) from None
    held = in_force(entries)
    if held[0].step:
        raise UserError(f"{path}: its first entry holds from step {held[0].step}, not 0: restore it from a copy")
    return held


def append(run_dir: Path, entry: Entry) -> None:
    """Records an entry. The file is replaced by a longer one, so that it is whole whatever happens meanwhile.

    Raises:
        UserError: It cannot be written; the file is as it was.
    """
    path, partial = run_dir / NAME, run_dir / f"{NAME}.partial"
    record = entry.to_json()
    line = json.dumps({**record, _SEAL: _digest(record)}, allow_nan=False)
    try:
        known = path.read_bytes() if path.exists() else b""
        with partial.open("wb") as file:
            file.write(known + f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(run_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the run cannot change its data") from None


def next_entry(entries: Sequence[Entry], run: schema.Run, sources: Sources, step: int) -> Entry | None:
    """The entry that is missing for a run to go on from a step with its present data settings.

    Entries of later steps with the same data stay: what a run once skipped it skips again when it comes back there.

    Args:
        entries: Those that hold.
        run: As it is now.
        sources: Where its stores are opened.
        step: Number of updates done.

    Returns:
        None where nothing changed; with no entries yet, one that holds from step 0.
    """
    if not entries:
        return Entry.of(run, sources, 0)
    now = Entry.of(run, sources, step)
    at_step = Course(entries).entry(step)
    if all(entry.same_data(now) for entry in entries if entry.step >= at_step.step):
        return None
    return replace(now, skipped_samples=at_step.skipped_samples, cause=at_step.cause) if at_step.step == step else now


def skip(entries: Sequence[Entry], step: int, until: int, cause: str) -> Entry:
    """The entry with which a run that goes back to `step` passes over all that steps `step` + 1 to `until` took.

    Args:
        entries: Those that hold.
        step: Number of updates that stay done.
        until: Number of updates that were done.
        cause: A sentence.
    """
    course = Course(entries)
    entry = course.entry(step)
    samples = course.first_sample(until) - course.first_sample(step)
    samples += sum(other.skipped_samples for other in entries if step < other.step < until)
    if entry.step == step:
        samples += entry.skipped_samples
    return replace(entry, step=step, skipped_samples=samples, cause=cause)


def changed_stores(entries: Sequence[Entry], run: schema.Run, sources: Sources, step: int) -> dict[str, str]:
    """Stores whose content is not what it was under the same path when the run read it.

    Returns:
        Config key (`Data.train` or `Data.stages`) -> a sentence for each such store, joined.
    """
    if not entries:
        return {}
    known = Course(entries).entry(step).stores
    stages = {path: weight for blend in run.data.stages.values() for path, weight in blend.items()}
    changes: dict[str, list[str]] = {}
    for key, paths in (("Data.train", run.data.train), ("Data.stages", stages)):
        for path in paths:
            digest = sources.open(path).digest
            if path in known and known[path].digest != digest:
                changes.setdefault(key, []).append(
                    f"{path} has other content than when the run read it "
                    f"(digest {shorten(known[path].digest)} -> {shorten(digest)})"
                )
    return {key: "; ".join(lines) for key, lines in changes.items()}


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()
