"""The samples of a store: windows of its stream, or rows of whole documents (`packing.py`).

Decides what sample number n of a store is, and which store a source of a run is read from. Does not decide which
samples a step has (`course.py`).

Invariant: a source is what it was when the run first read it: its digest is checked before the first sample is read.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mtx.data.packing import PackedRows
from mtx.data.store import CACHE_BYTES, Store, open_store
from mtx.errors import UserError

Packing = Literal["windows", "documents"]


class Windows:
    """Slices of seq_len + 1 tokens of the stream; each begins with the last token of the one before it.

    So every token but the first is a target once, up to the last whole window.
    """

    def __init__(self, store: Store, seq_len: int):
        self._store = store
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (self._store.num_tokens - 1) // self._seq_len

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens`: int32[n, seq_len + 1]."""
        return {"tokens": self._store.read_windows(numbers * self._seq_len, self._seq_len + 1)}

    def read_weighted(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As `read`, also past the last whole window: end-of-document ids there.

        Returns:
            `tokens`: int32[n, seq_len + 1]; `weights`: float32[n, seq_len], 1 where the target is a token of the
            stream and 0 where there is none.
        """
        num_tokens, length = self._store.num_tokens, self._seq_len + 1
        starts = np.minimum(numbers * self._seq_len, num_tokens)
        present = np.arange(length) < np.minimum(num_tokens - starts, length)[:, None]
        tokens = np.full((len(numbers), length), self._store.end_of_document_id, np.int32)
        tokens[present] = self._store.read_spans(starts, present.sum(axis=1))
        return {"tokens": tokens, "weights": present[:, 1:].astype(np.float32)}

    def targets(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in the stream the targets of some samples (int64[n]) are.

        Returns:
            starts, lengths: int64[m], spans of the stream; places: int64[m], which of `numbers` each span is of.
        """
        return numbers * self._seq_len + 1, np.full(len(numbers), self._seq_len), np.arange(len(numbers))

    def containing(self, start: int, stop: int) -> np.ndarray:
        """The samples with a target among tokens [start, stop) of the stream: int64[n]."""
        first = max(0, (start - 1) // self._seq_len)
        return np.arange(first, min((stop - 2) // self._seq_len + 1, len(self)))


Samples = Windows | PackedRows


def make_samples(store: Store, seq_len: int, packing: Packing, *, partial: bool = False) -> Samples:
    """The samples of a store.

    Raises:
        UserError: There is none; with `partial`, not even a part of one.
    """
    if packing == "documents":
        return PackedRows(store, seq_len)
    if store.num_tokens < (2 if partial else seq_len + 1):
        raise UserError(
            f"{store.path}: {store.num_tokens} tokens are too few for one window of Train.seq_len + 1 = {seq_len + 1}; "
            "build a larger store, or set a smaller Train.seq_len or Data.packing = 'documents'"
        )
    return Windows(store, seq_len)


class Sources:
    """The stores of a run, each opened once, with their samples."""

    def __init__(self, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Args: cache_bytes: Memory for the tokens of each store."""
        self._cache_bytes = cache_bytes
        self._stores: dict[str, Store] = {}
        self._samples: dict[tuple[str, int, Packing], Samples] = {}

    def open(self, path: str) -> Store:
        """The store at a path, as the config names it.

        Raises:
            UserError: There is none, or it is damaged.
        """
        if path not in self._stores:
            self._stores[path] = open_store(path, cache_bytes=self._cache_bytes)
        return self._stores[path]

    def samples(self, store: Store, seq_len: int, packing: Packing) -> Samples:
        """As `make_samples`, which makes them once."""
        key = store.digest, seq_len, packing
        if key not in self._samples:
            self._samples[key] = make_samples(store, seq_len, packing)
        return self._samples[key]

    def find(self, digest: str, path: str) -> Store:
        """The store with a content, wherever it is now: among those opened, or where it was.

        Raises:
            UserError: It is not there any more, or has another content.
        """
        for store in self._stores.values():
            if store.digest == digest:
                return store
        store = self.open(path)
        if store.digest != digest:
            raise UserError(
                f"{path} has other content than when the run read it (digest {shorten(digest)}, now "
                f"{shorten(store.digest)}), and the order of the run's samples follows from it: put the store back as "
                "it was"
            )
        return store


def shorten(digest: str) -> str:
    """The beginning of a digest, for people."""
    return digest[:12]
