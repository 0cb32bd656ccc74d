"""Which documents a step trained on, and which steps trained on a document.

Both follow from the ledger by arithmetic; the second by going the way of a batch backwards, so that no step is looked
at in vain. Steps are counted from 1 here, as in `metrics.jsonl`: step 1 is the first update.

Decides what counts as having been in a step: a token that was a target there. Each is one once an epoch; the token
before the first of a window or of a document is only looked at.

Invariant: no token is read, and nothing is computed but what training itself reads its batches by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtx.config import reader
from mtx.config.checks import require_training_data
from mtx.data.batches import Batches
from mtx.data.course import Course, Stretch, order_key
from mtx.data.entry import Entry
from mtx.data.ledger import read_entries
from mtx.data.samples import Samples, Sources
from mtx.data.shuffle import unpermute
from mtx.data.store import Store
from mtx.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """Tokens of a document in a step."""

    step: int
    store: str
    document: int
    id: str
    tokens: int


def open_batches(run_dir: Path) -> Batches:
    """The batches of a run directory, by its ledger; by its config where it has none yet.

    Raises:
        UserError: It is no run directory, or its ledger is damaged.
    """
    if not (run_dir / "config.gin").is_file():
        raise UserError(
            f"{run_dir} is no run directory, it holds no config.gin; name the folder that `mtx train` made, or a store "
            "with --run RUN_DIR"
        )
    run = reader.load(run_dir / "config.gin").run
    require_training_data(run)
    sources = Sources()
    return Batches(Course(read_entries(run_dir) or [Entry.of(run, sources, 0)]), sources)


def find_stores(batches: Batches, path: str | None = None) -> dict[str, str]:
    """The stores of a run, digest -> path; with a path, the one that has the content of the store there.

    Raises:
        UserError: The run never reads such a store.
    """
    tallies = batches.course.stretches[-1].tallies.values()
    stores = {tally.content.digest: tally.path for tally in tallies}
    if path is None:
        return stores
    digest = batches.sources.open(path).digest
    if digest not in stores:
        raise UserError(f"{path}: the run reads no store with this content; it reads {', '.join(stores.values())}")
    return {digest: path}


def documents_of(batches: Batches, step: int, stores: Mapping[str, str]) -> list[Occurrence]:
    """The documents of a step, those with most tokens first.

    Args:
        batches: Of the run.
        step: From 1.
        stores: Those that are meant, digest -> path.

    Raises:
        UserError: One is gone, or not what it was.
    """
    found = []
    rows = np.arange(batches.course.size(step - 1))
    for draw, store, samples, numbers in batches.draws(step - 1, rows, stores):
        starts, lengths, _ = samples.targets(numbers)
        for document, tokens in zip(*_count(store.document_ends, starts, lengths)):
            found.append(_occurrence(step, stores[draw.digest], store, document, tokens))
    return sorted(found, key=lambda occurrence: -occurrence.tokens)


def steps_with(
    batches: Batches, stores: Mapping[str, str], document: int | str, first: int, last: int
) -> list[Occurrence]:
    """The steps that trained on a document, in order.

    Args:
        batches: Of the run.
        stores: Those that are meant, digest -> path.
        document: Its number, where one store is meant, or its id.
        first, last: Steps, from 1.

    Raises:
        UserError: There is no such document, or a store is gone or not what it was.
    """
    found = []
    for digest, number in _find_document(batches, stores, document).items():
        store, source = batches.sources.find(digest, stores[digest]), batches.course.numbers[digest]
        stretches = batches.course.stretches
        for stretch, end in zip(stretches, [*(after.first_step for after in stretches[1:]), last]):
            begin, end = max(stretch.first_step, first - 1), min(end, last)
            if begin < end and source in stretch.numbers:
                samples = batches.sources.samples(store, stretch.entry.seq_len, stretch.entry.packing)
                counts = _steps_in(stretch, source, samples, store.document_span(number), begin, end)
                for step, tokens in zip(*counts):
                    found.append(_occurrence(step + 1, stores[digest], store, number, tokens))
    return sorted(found, key=lambda occurrence: occurrence.step)


def _find_document(batches: Batches, stores: Mapping[str, str], document: int | str) -> dict[str, int]:
    """Digest of a store -> number of the document in it."""
    if isinstance(document, int):
        if len(stores) > 1:
            raise UserError(
                f"document {document} of which store? Name one instead of the run, and the run with --run: "
                f"{', '.join(stores.values())}"
            )
        return dict.fromkeys(stores, document)
    found: dict[str, int] = {}
    missing = None
    for digest, path in stores.items():
        store = batches.sources.find(digest, path)
        try:
            found[digest] = store.find_document(document)
        except UserError as error:
            missing = error
    if not found and missing:
        raise missing
    return found


def _steps_in(
    stretch: Stretch, source: int, samples: Samples, span: tuple[int, int], begin: int, end: int
) -> tuple[list[int], list[int]]:
    """The steps in [begin, end) of a stretch with tokens of a span of a source's stream, and how many."""
    start, stop = span
    numbers = samples.containing(start, stop)
    starts, lengths, places = samples.targets(numbers)
    inside = np.maximum(np.minimum(starts + lengths, stop) - np.maximum(starts, start), 0)
    tokens = np.bincount(places, inside, len(numbers)).astype(np.int64)
    low, high = (stretch.tallies_at(step)[source].position for step in (begin, end))
    num_samples, seed = stretch.tallies[source].content.num_samples, stretch.entry.seed
    steps, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for epoch in range(low // num_samples, -(-high // num_samples)):
        positions = epoch * num_samples + unpermute(numbers, num_samples, order_key(seed, source, epoch))
        read = (low <= positions) & (positions < high)
        steps.append(stretch.steps_of(source, positions[read]))
        counts.append(tokens[read])
    return _sum_by(np.concatenate(steps), np.concatenate(counts))


def _count(document_ends: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """The documents that spans of a stream are of, and how many tokens of each."""
    stops = starts + lengths
    firsts = np.searchsorted(document_ends, starts, side="right")
    sizes = np.searchsorted(document_ends, stops - 1, side="right") + 1 - firsts
    spans = np.repeat(np.arange(len(starts)), sizes)
    documents = np.arange(len(spans)) - np.repeat(np.cumsum(sizes) - sizes - firsts, sizes)
    begins = np.maximum(starts[spans], np.where(documents > 0, document_ends[documents - 1], 0))
    return _sum_by(documents, np.minimum(stops[spans], document_ends[documents]) - begins)


def _sum_by(keys: np.ndarray, values: np.ndarray) -> tuple[list[int], list[int]]:
    """The different keys (int64[n]), rising, with the sums of their values (int64[n])."""
    different, places = np.unique(keys, return_inverse=True)
    return different.tolist(), np.bincount(places, values, len(different)).astype(np.int64).tolist()


def _occurrence(step: int, path: str, store: Store, document: int, tokens: int) -> Occurrence:
    return Occurrence(step=step, store=path, document=document, id=store.document_id(document), tokens=tokens)
