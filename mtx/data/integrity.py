"""The manifest of a token store: its counts, and the size and BLAKE2b digest of every file.

Decides how a folder is sealed and checked. Knows nothing of what is in the files.

Invariant: the manifest is written last and has exactly one valid text, so no byte of the store can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading release the interpreter lock


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Digests every file below `folder` and writes the manifest: `content`, `files` and its own digest. All to disk."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    digests = _map(lambda name: _digest(folder / name, sync=True), names)
    text = _encode(content | {"files": dict(zip(names, digests))})
    with (folder / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content that was sealed, with `files`: path below the folder -> {size_bytes, blake2b}.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A byte of it changed.
    """
    raw = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(raw)
        del content["digest"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("is not a manifest") from None
    if _encode(content).encode() != raw:
        raise ValueError("changed since it was written: its own digest does not fit")
    return content


def check_sizes(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the presence and size of the files, a line each, without reading them."""
    return [line for name, entry in manifest["files"].items() if (line := _check_size(folder / name, entry))]


def check_digests(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files that the manifest lists, a line each; reads every byte."""

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        path, entry = folder / item[0], item[1]
        try:
            problem = _check_size(path, entry)
            if problem is None and _digest(path) != entry:
                problem = f"{path}: its content changed (BLAKE2b digest differs)"
        except OSError as error:
            problem = f"{path}: unreadable ({error.strerror})"
        return problem

    return [line for line in _map(check, manifest["files"].items()) if line]


def _check_size(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    size_bytes = path.stat().st_size
    return None if size_bytes == entry["size_bytes"] else f"{path}: {size_bytes} bytes, not {entry['size_bytes']}"


def _digest(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        return {"size_bytes": file.tell(), "blake2b": digest.hexdigest()}


def digest_content(content: dict[str, Any]) -> str:
    """BLAKE2b digest of what a manifest holds: equal where every byte of every file that it seals is."""
    return hashlib.blake2b(json.dumps(content, indent=1, sort_keys=True).encode(), digest_size=32).hexdigest()


def _encode(content: dict[str, Any]) -> str:
    return json.dumps({"digest": digest_content(content)} | content, indent=1) + "\n"


def _map(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
