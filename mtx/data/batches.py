"""The batch of each step, as a pure function of the course of the run and the step.

    step and row       -> source, epoch, place in it    by the course (`course.py`)
    epoch and place    -> sample of the store           by a permutation of its own for each epoch (`shuffle.py`)
    sample             -> tokens                        a window, or a row of documents (`samples.py`)

Decides what the samples of a run are. Does not decide which process reads which.

Invariant: no state. Any process can read any rows of any step, and together the rows are the same batch for any number
of processes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import numpy as np

from mtx.data.course import Course, Draw, order_key
from mtx.data.samples import Packing, Samples, Sources, Windows, make_samples
from mtx.data.shuffle import permute
from mtx.data.store import Store
from mtx.data.tokenizer import Tokenizer
from mtx.errors import UserError

Rows = slice | Sequence[int]


class Batches:
    """The training batches."""

    def __init__(self, course: Course, sources: Sources):
        """Args: course: What each step reads; sources: where its stores are opened, when a step needs them."""
        self.course = course
        self.sources = sources

    def read(self, step: int, rows: Rows = slice(None)) -> dict[str, np.ndarray]:
        """Rows of the global batch of a step.

        Args:
            step: From 0.
            rows: Which of the `course.size(step)` rows.

        Returns:
            `tokens`: int32[rows, seq_len + 1]. With packing "documents" also `segments`: int32[rows, seq_len + 1], the
            number of the document in the row from 1, 0 in padding, and `positions`: int32[rows, seq_len + 1], the place
            in the document.

        Raises:
            UserError: A store that the step needs is gone, damaged, or not what it was.
        """
        numbers = _row_numbers(self.course.size(step), rows)
        batch: dict[str, np.ndarray] = {}
        for draw, _, samples, chosen in self.draws(step, numbers):
            for name, array in samples.read(chosen).items():
                if name not in batch:
                    batch[name] = np.empty((len(numbers), *array.shape[1:]), array.dtype)
                batch[name][draw.rows] = array
        return batch

    def draws(
        self, step: int, rows: np.ndarray, digests: Container[str] | None = None
    ) -> Iterator[tuple[Draw, Store, Samples, np.ndarray]]:
        """For each source of some rows (int64[n]) of a step: its share, its store, its samples, those drawn (int64[m]).

        With `digests`, only for stores that have one of them.

        Raises:
            UserError: As `read`.
        """
        entry = self.course.entry(step)
        for draw in self.course.draws(step, rows):
            if digests is not None and draw.digest not in digests:
                continue
            store = self.sources.find(draw.digest, draw.path)
            numbers = np.empty_like(draw.places)
            for epoch in np.unique(draw.epochs).tolist():
                chosen = draw.epochs == epoch
                key = order_key(entry.seed, draw.source, epoch)
                numbers[chosen] = permute(draw.places[chosen], draw.num_samples, key)
            yield draw, store, self.sources.samples(store, entry.seq_len, entry.packing), numbers


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
