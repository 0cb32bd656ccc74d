"""The token store as its readers see it: a stream of token ids, cut into documents.

Decides how random windows are read fast. Does not decide which windows are read (`batches.py`) or how a store is made
(`build.py`).

Invariant: a store that opens is one that a build completed, and every token that is read has been checked against its
checksum.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtx.data import integrity
from mtx.data.arrays import CHUNK, ArrayReader
from mtx.data.tokenizer import Tokenizer, load_tokenizer
from mtx.errors import UserError

FORMAT, VERSION = "mtx token store", 1  # what `mtx data build` writes and this file reads
CACHE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """A document of a store. `tokens`: int32[num_tokens], without the token that ends it."""

    index: int
    id: str
    source: str
    line: int
    tokens: np.ndarray


class Store:
    """A token store. Open one with `open_store`. May be read from several threads."""

    def __init__(self, path: Path, manifest: dict[str, Any], cache_bytes: int):
        self.path = path
        self.manifest = manifest
        self.digest = integrity.digest_content(manifest)  # of all that the store holds
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.end_of_document_id: int = manifest["end_of_document_id"]
        self._tokens = ArrayReader(path / "tokens")
        itemsize = np.dtype(manifest["dtype"]).itemsize
        # What is read at a time and kept: everything, where that has room, else the unit that has a checksum.
        self._block = self.num_tokens if self.num_tokens * itemsize <= cache_bytes else CHUNK
        self._max_blocks = max(1, cache_bytes // (self._block * itemsize))
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()  # block number -> its tokens, least used first
        self._lock = threading.Lock()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was built with, from the copy inside it."""
        return load_tokenizer(self.path / "tokenizer")

    @cached_property
    def document_ends(self) -> np.ndarray:
        """int64[num_documents]: document i is tokens [ends[i-1], ends[i]); its last one is the end-of-document id."""
        return ArrayReader(self.path / "document_ends").read()

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of `starts` (int[n]): int32[n, length].

        Raises:
            UserError: A file is missing or damaged.
        """
        return self.read_spans(starts, np.full(len(starts), length)).reshape(len(starts), length)

    def read_spans(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens [start, start + length) for each pair, one span after the other: int32[sum(lengths)].

        Args:
            starts: int[n].
            lengths: int[n]; the spans lie inside the stream.

        Raises:
            UserError: A file is missing or damaged.
        """
        if len(starts) and (starts.min() < 0 or (starts + lengths).max() > self.num_tokens):
            raise IndexError(f"{self.path} has {self.num_tokens} tokens")
        spans = list(zip(starts.tolist(), lengths.tolist()))
        size = self._block
        blocks = self._blocks({i for start, n in spans for i in range(start // size, -(-(start + n) // size))})
        out = np.empty(int(lengths.sum()), np.int32)
        at = 0
        for start, length in spans:
            end = at + length
            while at < end:
                number, offset = divmod(start, size)
                taken = min(size - offset, end - at)
                out[at : at + taken] = blocks[number][offset : offset + taken]
                at += taken
                start += taken
        return out

    def document(self, index: int) -> StoredDocument:
        """Document number `index`, from 0.

        Raises:
            UserError: There is no such document.
        """
        start, stop = self.document_span(index)
        source = self.sources[int(np.searchsorted(self._first_documents, index, side="right")) - 1]
        return StoredDocument(
            index=index,
            id=self.document_id(index),
            source=source["path"],
            line=int(ArrayReader(self.path / "document_lines").read(index, index + 1)[0]),
            tokens=self.read_spans(np.array([start]), np.array([stop - 1 - start])),
        )

    def document_span(self, index: int) -> tuple[int, int]:
        """Where in the stream a document begins and where it ends, with the token that ends it.

        Raises:
            UserError: There is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise UserError(f"{self.path}: no document {index}; it has 0 to {self.num_documents - 1}")
        return int(self.document_ends[index - 1]) if index else 0, int(self.document_ends[index])

    def document_id(self, index: int) -> str:
        """The id of document number `index`, which there is."""
        start = self._id_ends[index - 1] if index else 0
        return bytes(self._id_bytes[start : self._id_ends[index]]).decode()

    def document_length_quantiles(self, quantiles: Sequence[float]) -> dict[float, int]:
        """Quantile in [0, 1] -> tokens of a document, without the token that ends it."""
        lengths = np.diff(self.document_ends, prepend=0) - 1
        return dict(zip(quantiles, np.quantile(lengths, quantiles, method="inverted_cdf").astype(int).tolist()))

    def find_document(self, document_id: str) -> int:
        """Number of the first document with an id.

        Raises:
            UserError: There is none.
        """
        wanted = document_id.encode()
        ends = self._id_ends
        lengths = np.diff(ends, prepend=0)
        ids = self._id_bytes.tobytes()
        for index in np.flatnonzero(lengths == len(wanted)):
            if ids[ends[index] - len(wanted) : ends[index]] == wanted:
                return int(index)
        raise UserError(f"{self.path}: no document has the id {document_id!r}")

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """The input files: path, size_bytes, first_document and the counts of `mtx.data.encode.Counts`."""
        return list(_read_json_lines(self.path / "sources.jsonl"))

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.array([source["first_document"] for source in self.sources])

    @cached_property
    def _id_ends(self) -> np.ndarray:
        return ArrayReader(self.path / "id_ends").read()

    @cached_property
    def _id_bytes(self) -> np.ndarray:
        return ArrayReader(self.path / "id_bytes").read()

    def _blocks(self, numbers: set[int]) -> dict[int, np.ndarray]:
        """The blocks with these numbers, from the cache where it has them."""
        with self._lock:
            found = {number: self._cache[number] for number in numbers if number in self._cache}
            for number in found:
                self._cache.move_to_end(number)
        missing = sorted(numbers - found.keys())
        if missing:
            spans = [(number * self._block, min((number + 1) * self._block, self.num_tokens)) for number in missing]
            read = dict(zip(missing, self._tokens.read_many(spans)))
            found |= read
            with self._lock:
                self._cache |= read
                while len(self._cache) > self._max_blocks:
                    self._cache.popitem(last=False)
        return found


def open_store(path: str | Path, *, cache_bytes: int = CACHE_BYTES) -> Store:
    """Opens a token store; checks its manifest, and that every file is there in its size.

    Args:
        path: The folder.
        cache_bytes: Memory for tokens. A store that fits is read once; of a larger one, what was last read is kept.

    Raises:
        UserError: It is not a token store, not whole, or of a format that this version does not know.
    """
    path = Path(path)
    manifest = read_store_manifest(path)
    problems = integrity.check_sizes(path, manifest)
    if problems:
        shown = "\n  ".join(problems[:10])
        raise UserError(
            f"{path}: the token store is damaged:\n  {shown}\nrestore it from a copy or build it again (mtx data build)"
        )
    return Store(path, manifest, cache_bytes)


def read_store_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a token store.

    Raises:
        UserError: It is not a token store, its manifest is damaged, or its format is not known.
    """
    try:
        manifest = integrity.read_manifest(path)
    except FileNotFoundError:
        raise UserError(f"{path}: {_why_no_store(path)}") from None
    except NotADirectoryError:
        raise UserError(f"{path}: a file, not a token store, which is a folder that `mtx data build` makes") from None
    except ValueError as error:
        raise UserError(
            f"{path / integrity.MANIFEST}: {error}; restore it from a copy or build the store again (mtx data build)"
        ) from None
    kind, version = manifest.get("format"), manifest.get("version")
    if (kind, version) != (FORMAT, VERSION):
        raise UserError(f"{path}: holds {kind!r} version {version}, not {FORMAT!r} version {VERSION}; build it again")
    return manifest


def _why_no_store(path: Path) -> str:
    building = path.with_name(path.name + ".building")
    if not path.exists() and building.exists():
        return f"not there yet: its build did not finish ({building}); the same `mtx data build` command goes on"
    if not path.exists():
        return "no such token store; make it with `mtx data build INPUT... --tokenizer PATH --out STORE`"
    return f"not a token store: it has no {integrity.MANIFEST}; `mtx data build` makes one"


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
