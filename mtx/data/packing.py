"""Whole documents packed into rows, which do not see each other.

    document of n tokens, its end included   ->  n targets, each predicted from the tokens before it in the document;
                                                 the first one from an end-of-document token, which so begins it, too
    piece of m <= seq_len targets            ->  m + 1 slots of a row: the token before them, and them
    row of seq_len + 1 slots                 ->  pieces one after the other, then padding

Decides which pieces share a row. Does not decide the order of rows (`batches.py`).

Invariant: every token of the store is a target exactly once in the rows of a plan.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from mtx.data.store import Store

# A set of rows that are filled alike: how many, and what is in them, as (slots, copies, what else is in them).
_Content = tuple[int, int, "_Content"] | None


class PackedRows:
    """The rows of a store. Documents longer than `seq_len` tokens are cut; all their pieces but the last fill a row."""

    def __init__(self, store: Store, seq_len: int):
        self._store = store
        self._slots = seq_len + 1
        self._starts, self._targets, self._row_ends = plan(store.document_ends, seq_len)

    def __len__(self) -> int:
        return len(self._row_ends)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by number; numbers past the end are rows of padding.

        Args:
            rows: int64[n].

        Returns:
            `tokens`: int32[n, seq_len + 1], end-of-document ids in padding; `segments`: int32[n, seq_len + 1], number
            of the piece in its row from 1, 0 in padding; `positions`: int32[n, seq_len + 1], place in the piece.
        """
        pieces, num_pieces = self._pieces(rows)
        starts, slots = self._starts[pieces], self._targets[pieces] + 1
        numbers = _ranges(np.zeros_like(num_pieces), num_pieces)
        # Where each piece begins in the batch, seen as one line of slots: what precedes it in its row, after the row.
        before = np.cumsum(slots) - slots
        row_of_piece = np.repeat(np.arange(len(rows)), num_pieces)
        first_piece = (np.cumsum(num_pieces) - num_pieces)[row_of_piece]
        begins = row_of_piece * self._slots + before - before[first_piece]

        shape = (len(rows), self._slots)
        tokens = np.full(shape, self._store.end_of_document_id, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        # Nothing precedes the first token of the stream: the end-of-document token before it is put in.
        is_first = starts == 0
        spans = self._store.read_spans(starts - 1 + is_first, slots - is_first)
        absent = before[is_first] - np.arange(is_first.sum())
        places = _ranges(begins, slots)
        tokens.reshape(-1)[places] = np.insert(spans, absent, self._store.end_of_document_id)
        segments.reshape(-1)[places] = np.repeat(numbers + 1, slots)
        positions.reshape(-1)[places] = places - np.repeat(begins, slots)
        return {"tokens": tokens, "segments": segments, "positions": positions}

    def targets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in the stream the targets of some rows (int64[n]) are.

        Returns:
            starts, lengths: int64[m], spans of the stream; places: int64[m], which of `rows` each span is of.
        """
        pieces, num_pieces = self._pieces(rows)
        return self._starts[pieces], self._targets[pieces], np.repeat(np.arange(len(rows)), num_pieces)

    def containing(self, start: int, stop: int) -> np.ndarray:
        """The rows with a target among tokens [start, stop) of the stream: int64[n]."""
        pieces = np.flatnonzero((self._starts < stop) & (self._starts + self._targets > start))
        return np.unique(np.searchsorted(self._row_ends, pieces, side="right"))

    def _pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of each row, one row after the other, and how many each has. None past the last row."""
        row_begins = np.append(0, self._row_ends)
        known = np.minimum(rows, len(self))
        num_pieces = row_begins[np.minimum(known + 1, len(self))] - row_begins[known]
        return _ranges(row_begins[known], num_pieces), num_pieces


def plan(document_ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pieces are in which row: best fit, longest first, on the histogram of lengths.

    Equal lengths are placed together, so the work grows with the number of lengths; the documents themselves are only
    sorted. Source of the idea of packing histograms: arXiv 2107.02027.

    Args:
        document_ends: int64[documents].
        seq_len: Targets that a row has room for, if they are of one piece.

    Returns:
        starts: int64[pieces], place of the first target in the stream; targets: int64[pieces]; row_ends: int64[rows],
        number of pieces up to the end of a row. Rows come in the order of the documents in them, as far as they can.
    """
    begins = np.append(0, document_ends[:-1])
    lengths = document_ends - begins
    num_full, rest = lengths // seq_len, lengths % seq_len
    full_starts = _ranges(np.zeros_like(num_full), num_full) * seq_len + np.repeat(begins, num_full)

    with_rest = np.flatnonzero(rest)
    rest = rest[with_rest]
    rest_starts = document_ends[with_rest] - rest
    by_length = np.argsort(rest, kind="stable")
    counts = np.bincount(rest, minlength=seq_len)
    taken = np.cumsum(counts) - counts  # per length, where in by_length the pieces not yet placed begin
    orders, row_sizes = [np.arange(len(full_starts))], [np.ones(len(full_starts), np.int64)]
    for num_rows, content in _best_fit(np.append(0, counts), seq_len + 1):
        columns = []
        while content is not None:
            slots, copies, content = content
            first = taken[slots - 1]
            taken[slots - 1] += num_rows * copies
            columns.append(by_length[first : taken[slots - 1]].reshape(num_rows, copies))
        rows = np.hstack(columns)
        orders.append(rows.reshape(-1) + len(full_starts))
        row_sizes.append(np.full(num_rows, rows.shape[1]))

    order, sizes = np.concatenate(orders), np.concatenate(row_sizes)
    starts = np.concatenate([full_starts, rest_starts])
    targets = np.concatenate([np.full(len(full_starts), seq_len), rest])
    earliest = np.minimum.reduceat(starts[order], np.cumsum(sizes) - sizes)
    rows_in_order = np.argsort(earliest, kind="stable")
    order = order[_ranges((np.cumsum(sizes) - sizes)[rows_in_order], sizes[rows_in_order])]
    return starts[order], targets[order], np.cumsum(sizes[rows_in_order])


def _best_fit(counts: np.ndarray, capacity: int) -> Iterator[tuple[int, _Content]]:
    """Packs counts[s] pieces of s slots each, for every s, into rows. Yields sets of rows that are filled alike."""
    groups: dict[int, list[tuple[int, _Content]]] = {}  # free slots -> sets of rows
    free: list[int] = []  # the keys of groups, sorted
    for slots in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[slots])
        while left:
            tightest = bisect_left(free, slots)
            if tightest == len(free):
                room, num_rows, content = capacity, left, None
            else:
                room = free[tightest]
                num_rows, content = groups[room].pop()
            copies = min(room // slots, left)
            filled = min(num_rows, left // copies)
            left -= filled * copies
            if content is not None and filled < num_rows:
                groups[room].append((num_rows - filled, content))
            elif content is not None and not groups[room]:
                del groups[room], free[tightest]
            room -= copies * slots
            if room not in groups:
                groups[room] = []
                insort(free, room)
            groups[room].append((filled, (slots, copies, content)))
    for group in groups.values():
        yield from group


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each length, one after the other: int64[sum(lengths)]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
