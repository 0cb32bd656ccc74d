"""One-dimensional checksummed arrays on disk: the only file that touches TensorStore.

Decides the storage format: zarr 3, sharded, little-endian, a crc32c on every chunk. Knows nothing of documents.

Invariant: what is read is what was written. TensorStore reads a missing chunk as zeros and drops chunks of zeros unless
told otherwise, so both are switched off here and both kinds of damage become errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from mtx.errors import UserError

# Elements per chunk, the unit that is read and checked. Smaller ones would make random reads of short windows cheaper
# and the index of a shard larger: 8 Ki is 16 KiB of uint16 and an index of 32 KiB per 16 Mi elements.
CHUNK = 8192


class ArrayWriter:
    """Writes a new array of known length from pieces that arrive in order, one shard (file) at a time."""

    def __init__(self, path: Path, *, dtype: np.dtype, length: int, shard: int):
        """Creates the array.

        Args:
            path: Folder of the array; must not exist.
            dtype: Of the elements.
            length: Number of elements, all of which must be appended before `close`.
            shard: Elements per file, a multiple of CHUNK.
        """
        bytes_and_crc = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        if dtype.itemsize == 1:
            bytes_and_crc[0] = {"name": "bytes"}
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [CHUNK],
            "codecs": bytes_and_crc,
            "index_codecs": [little_endian, {"name": "crc32c"}],
        }
        metadata = {
            "shape": [length],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = _spec(path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        self._path = path
        self._array = ts.open(spec, create=True).result()
        self._shard = np.empty(min(shard, length), dtype)
        self._filled = 0
        self._written = 0

    def append(self, values: np.ndarray) -> None:
        """Adds elements at the end."""
        while len(values):
            taken = min(len(values), len(self._shard) - self._filled)
            self._shard[self._filled : self._filled + taken] = values[:taken]
            self._filled += taken
            values = values[taken:]
            if self._filled == len(self._shard):
                self._flush()

    def close(self) -> None:
        """Writes the last shard."""
        self._flush()
        if self._written != self._array.shape[0]:
            raise ValueError(f"{self._written} elements were appended to an array of {self._array.shape[0]}")

    def _flush(self) -> None:
        if self._filled:
            end = self._written + self._filled
            try:
                self._array[self._written : end].write(self._shard[: self._filled]).result()
            except ValueError as error:  # a full disk, for one
                raise UserError(f"{self._path}: cannot be written: {error}") from None
            self._written, self._filled = end, 0


class ArrayReader:
    """Reads an array that ArrayWriter wrote."""

    def __init__(self, path: Path):
        """Opens the array.

        Raises:
            UserError: It is missing or damaged.
        """
        self._path = path
        try:
            # Without a cache of its own: the token store keeps chunks as NumPy arrays, which is several times faster.
            self._array = ts.open(_spec(path), open=True, read=True).result()
        except ValueError as error:
            raise _damaged(path, error) from None

    def __len__(self) -> int:
        return self._array.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop)."""
        return self.read_many([(start, len(self) if stop is None else stop)])[0]

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Elements [start, stop) of each span, all read at once.

        Raises:
            UserError: A file is missing or a checksum does not fit; names the file.
        """
        with ts.Batch() as batch:
            futures = [self._array[start:stop].read(batch=batch) for start, stop in spans]
        try:
            return [future.result() for future in futures]
        except ValueError as error:
            raise _damaged(self._path, error) from None


def _spec(path: Path) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": str(path)}
    return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}


def _damaged(path: Path, error: ValueError) -> UserError:
    reason = str(error).split(" [tensorstore_spec=")[0]
    return UserError(
        f"{path}: cannot be read, the token store is damaged: {reason}\n"
        f"`mtx data verify {path.parent}` names every damaged file; restore them from a copy or build the store again"
    )
