"""The batch of each step, as a pure function of the config and the step.

    sample number      -> source, position in it        by weight (`blend.py`)
    position           -> epoch, place in it            an epoch is every sample of the source once
    epoch and place    -> window or row of the store    by a permutation of its own for each epoch (`shuffle.py`)

Decides what the samples of a run are. Does not decide how many a step has (`ramp.py`), nor which process reads which.

Invariant: no state. Any process can read any rows of any step, and together the rows are the same batch for any number
of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mtx.data.blend import Blend
from mtx.data.packing import PackedRows
from mtx.data.ramp import BatchSizes
from mtx.data.shuffle import permute
from mtx.data.store import Store
from mtx.data.tokenizer import Tokenizer
from mtx.errors import UserError

Packing = Literal["windows", "documents"]
Rows = slice | Sequence[int]


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


class Batches:
    """The training batches."""

    def __init__(
        self,
        sources: Sequence[tuple[Store, float]],
        *,
        seq_len: int,
        batch_sizes: BatchSizes,
        seed: int,
        packing: Packing = "windows",
    ):
        """Args: sources: stores with their weights; seq_len: targets per row; seed: of the order.

        Raises:
            UserError: A store is too short for one sample, or the weights are no shares.
        """
        self._blend = Blend([weight for _, weight in sources])
        self._samples = [make_samples(store, seq_len, packing) for store, _ in sources]
        self._sizes = batch_sizes
        self._seed = seed

    def read(self, step: int, rows: Rows = slice(None)) -> dict[str, np.ndarray]:
        """Rows of the global batch of a step.

        Args:
            step: From 0.
            rows: Which of the `batch_sizes.size(step)` rows.

        Returns:
            `tokens`: int32[rows, seq_len + 1]. With packing "documents" also `segments`: int32[rows, seq_len + 1], the
            number of the document in the row from 1, 0 in padding, and `positions`: int32[rows, seq_len + 1], the place
            in the document.
        """
        samples = self._sizes.first_sample(step) + _row_numbers(self._sizes.size(step), rows)
        sources, positions = self._blend.locate(samples)
        batch: dict[str, np.ndarray] = {}
        for source in np.unique(sources).tolist() or [0]:  # arrays of no rows, where no rows are asked for
            mine = np.flatnonzero(sources == source)
            arrays = self._samples[source].read(self._shuffled(source, positions[mine]))
            for name, array in arrays.items():
                if name not in batch:
                    batch[name] = np.empty((len(samples), *array.shape[1:]), array.dtype)
                batch[name][mine] = array
        return batch

    def source_counts(self, step: int) -> np.ndarray:
        """Samples drawn from each source before a step: int64[sources]."""
        return self._blend.counts(self._sizes.first_sample(step))

    def _shuffled(self, source: int, positions: np.ndarray) -> np.ndarray:
        length = len(self._samples[source])
        epochs, places = np.divmod(positions, length)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            numbers[chosen] = permute(places[chosen], length, f"{self._seed}/{source}/{epoch}")
        return numbers


class ValidationBatches:
    """The batches of a validation store: from its beginning, in order, each token at most once."""

    def __init__(self, store: Store, *, seq_len: int, batch_size: int, max_batches: int, packing: Packing = "windows"):
        """Raises: UserError: the store has no target."""
        self._samples = make_samples(store, seq_len, packing, partial=True)
        self._batch_size = batch_size
        if isinstance(self._samples, Windows):
            num_samples = -(-(store.num_tokens - 1) // seq_len)
        else:
            num_samples = len(self._samples)
        self.num_batches = min(max_batches, -(-num_samples // batch_size))

    def read(self, index: int, rows: Rows = slice(None)) -> dict[str, np.ndarray]:
        """Rows of batch `index`, from 0 to `num_batches` - 1.

        Returns:
            As `Batches.read`. Where the store ends within a batch, rows are filled with end-of-document ids: segments
            are 0 there, and with packing "windows" there is `weights`: float32[rows, seq_len], 1 for a target that is
            in the store and 0 for one that is not.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        numbers = index * self._batch_size + _row_numbers(self._batch_size, rows)
        if isinstance(self._samples, Windows):
            return self._samples.read_weighted(numbers)
        return self._samples.read(numbers)


def make_samples(store: Store, seq_len: int, packing: Packing, *, partial: bool = False) -> Windows | PackedRows:
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


def check_store(store: Store, *, key: str, model_vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Refuses a store that the model or the tokenizer of the run does not fit.

    Args:
        store: The store.
        key: Config key that names it, for the message, such as `Data.train`.
        model_vocab_size: `Model.vocab_size`.
        tokenizer: The run's. Held against every store, it makes sure that all stores have the same one.

    Raises:
        UserError: The store has ids that the model lacks, or another tokenizer made it.
    """
    if store.vocab_size > model_vocab_size:
        raise UserError(
            f"Model.vocab_size = {model_vocab_size} is less than the vocabulary of {key} {store.path}, which is "
            f"{store.vocab_size}: set Model.vocab_size to {store.vocab_size} or more"
        )
    if tokenizer is None:
        return
    files = " ".join(str(path) for path in tokenizer.files.values())
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key} {store.path} was built with another tokenizer (fingerprint {store.tokenizer_fingerprint}) than the "
            f"run's (Tokenizer.path), {files} (fingerprint {tokenizer.fingerprint}): build the store with that one, or "
            f"set Tokenizer.path to {store.path / 'tokenizer'}"
        )
    if store.end_of_document_id != tokenizer.end_of_document_id:
        raise UserError(
            f"{key} {store.path} ends documents with token {store.end_of_document_id}, the run's tokenizer (Tokenizer."
            f"path), {files}, with {tokenizer.end_of_document_id}: build the store without --end-of-document, or set "
            f"Tokenizer.path to {store.path / 'tokenizer'}"
        )


def _row_numbers(size: int, rows: Rows) -> np.ndarray:
    """The rows of a batch of `size` that are meant: int64[n]."""
    return np.arange(size)[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)]
