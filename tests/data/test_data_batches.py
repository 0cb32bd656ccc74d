"""Batches are a function of the step, see every sample once an epoch, and pack documents without loss."""

import hashlib

import numpy as np
import pytest

from mtx.config.schema import BatchRamp
from mtx.data.batches import Batches, ValidationBatches
from mtx.data.course import Course
from mtx.data.entry import Entry
from mtx.data.packing import plan
from mtx.data.samples import Sources
from mtx.data.shuffle import permute
from mtx.errors import UserError


@pytest.fixture
def store(make_store, random_texts):
    return make_store([text + "." for text in random_texts(60, seed=5)])


@pytest.fixture
def other(make_store, random_texts):
    return make_store([text + "!" for text in random_texts(20, seed=6)], name="other")


def stream(store):
    return store.read_windows(np.array([0]), store.num_tokens)[0]


@pytest.fixture
def make(make_run):
    def make(sources, **settings):
        opened = Sources()
        run = make_run({store.path: weight for store, weight in sources}, **settings)
        return Batches(Course([Entry.of(run, opened, 0)]), opened)

    return make


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_any_rows_of_any_step_in_any_order(make, store, other, packing):
    batches = make([(store, 0.7), (other, 0.3)], packing=packing)
    whole = {step: batches.read(step) for step in range(40)}
    again = make([(store, 0.7), (other, 0.3)], packing=packing)
    for step in (39, 0, 17):
        for rows in (slice(None), slice(0, 2), slice(2, 4), [3], np.array([2, 0]), slice(0, 0)):
            for name, array in again.read(step, rows).items():
                assert array.dtype == np.int32
                np.testing.assert_array_equal(array, whole[step][name][rows])
    names = {"tokens"} if packing == "windows" else {"tokens", "segments", "positions"}
    assert set(whole[0]) == names
    assert {array.shape for array in whole[0].values()} == {(4, 17)}


def test_an_epoch_is_every_window_once_in_an_order_of_its_own(make, store):
    windows = (store.num_tokens - 1) // 16
    batches = make([(store, 1.0)], batch=1)
    expected = sorted(stream(store)[i * 16 : i * 16 + 17].tolist() for i in range(windows))
    epochs = [[batches.read(e * windows + i)["tokens"][0].tolist() for i in range(windows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2]
    other_seed = make([(store, 1.0)], batch=1, seed=1)
    assert [other_seed.read(i)["tokens"][0].tolist() for i in range(windows)] != epochs[0]


def test_a_batch_may_straddle_epochs(make, store):
    windows = (store.num_tokens - 1) // 16
    single, large = make([(store, 1.0)], batch=1), make([(store, 1.0)], batch=2 * windows + 3)
    rows = large.read(1)["tokens"]
    for row in (0, windows - 1, 2 * windows + 2):
        np.testing.assert_array_equal(rows[row], single.read(2 * windows + 3 + row)["tokens"][0])


def test_sources_come_by_weight(make, store, other):
    batches = make([(store, 3.0), (other, 1.0)], batch=8)
    known = {tuple(stream(other)[i * 16 : i * 16 + 17].tolist()) for i in range((other.num_tokens - 1) // 16)}
    drawn = np.array([sum(tuple(row) in known for row in batches.read(step)["tokens"].tolist()) for step in range(30)])
    assert (np.abs(np.cumsum(drawn) - 2 * np.arange(1, 31)) <= 1.5).all()
    counts = [source["samples"] for source in batches.course.ledger(30)["sources"]]
    assert counts == [240 - drawn.sum(), drawn.sum()]


def test_the_order_of_a_seed_never_changes(make, store, other):
    """A resumed run depends on it; the permutation itself is held in test_data_order.py."""
    batches = make([(store, 1.0), (other, 1.0)], batch=6, seed=42)
    rows = batches.read(2)["tokens"]
    for source, (name, first) in enumerate([(store, 0), (other, 1)]):
        windows = (name.num_tokens - 1) // 16
        assert windows > 9
        numbers = permute(np.array([6, 7, 8]), windows, f"42/{source}/0")
        np.testing.assert_array_equal(rows[first::2], name.read_windows(numbers * 16, 17))


@pytest.mark.parametrize(
    ("packing", "digest"),
    [
        ("windows", "6e0beb903b1b898a353a2a15b1e73f0cf2b6b20eb5cb665e66fee727ef6727f9"),
        ("documents", "9407da6a449c70f77c8aa5126d3216114ee05fe6a4523977c7a82b6ada13e4b5"),
    ],
)
def test_batches_never_change(make, write_store, packing, digest):
    """Those of a run without stages are, bit for bit, what they were before there was a ledger."""
    rng = np.random.default_rng(1)
    sources = [(write_store(name, rng.integers(1, 60, count), seed), weight)
               for name, count, seed, weight in [("a", 300, 1, 0.7), ("b", 100, 2, 0.3)]]  # fmt: skip
    ramp = BatchRamp(start=4, increment=2, tokens=4000)
    batches = make(sources, seed=42, batch=12, packing=packing, batch_ramp=ramp)
    digests = hashlib.sha256()
    for step in range(200):
        for name, array in sorted(batches.read(step).items()):
            digests.update(name.encode() + np.ascontiguousarray(array, "<i4").tobytes())
    assert digests.hexdigest() == digest


def unpack(batch):
    """The pieces of a batch: tokens and positions of each."""
    pieces = []
    for tokens, segments, positions in zip(batch["tokens"], batch["segments"], batch["positions"]):
        assert (np.diff(segments[segments > 0]) >= 0).all()
        assert (segments[np.argmin(segments > 0) :] == 0).all() or (segments > 0).all()  # padding is at the end
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            assert mine.any()
            np.testing.assert_array_equal(positions[mine], np.arange(mine.sum()))
            pieces.append(tokens[mine])
        assert (positions[segments == 0] == 0).all()
    return pieces


@pytest.mark.parametrize("seq_len", [1, 7, 64, 4000])
def test_packing_makes_every_token_a_target_once(store, seq_len):
    """In its own document, after what precedes it there, or after the end of another document if it is the first."""
    batches = ValidationBatches(store, seq_len=seq_len, batch_size=5, max_batches=10**6, packing="documents")
    pieces = [piece for i in range(batches.num_batches) for piece in unpack(batches.read(i))]
    assert all(2 <= len(piece) <= seq_len + 1 for piece in pieces)
    tokens, end = stream(store), store.end_of_document_id
    expected = []
    for start, stop in zip([0, *store.document_ends[:-1]], store.document_ends):
        for first in range(start, stop, seq_len):
            before = tokens[first - 1] if first else end
            assert first > start or before == end
            expected.append([before, *tokens[first : min(first + seq_len, stop)]])
    assert sorted(piece.tolist() for piece in pieces) == sorted(map(list, np.array(expected, dtype=object)))


def test_packed_batches_shuffle_the_rows(make, store):
    batches = make([(store, 1.0)], seq_len=32, batch=1, packing="documents")
    rows = len(plan(store.document_ends, 32)[2])
    epochs = [[batches.read(e * rows + i)["tokens"][0].tolist() for i in range(rows)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_fills_its_rows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(5, 1.2, 3000).astype(np.int64) + 1
    ends = lengths.cumsum()
    starts, targets, row_ends = plan(ends, 512)
    order = np.argsort(starts)
    np.testing.assert_array_equal(starts[order], np.append(0, np.cumsum(targets[order])[:-1]))  # no gap, no overlap
    assert targets.sum() == ends[-1]
    used = np.add.reduceat(targets + 1, np.append(0, row_ends[:-1]))
    assert used.max() <= 513
    assert used.mean() > 0.97 * 513
    first_documents = starts[np.append(0, row_ends[:-1])]
    assert np.corrcoef(first_documents, np.arange(len(row_ends)))[0, 1] > 0.9  # about the order of the documents


def test_validation_windows_see_every_target_once(store):
    seq_len = 16
    batches = ValidationBatches(store, seq_len=seq_len, batch_size=7, max_batches=10**6)
    assert batches.num_batches == -(-(store.num_tokens - 1) // (7 * seq_len))
    targets = []
    for i in range(batches.num_batches):
        batch = batches.read(i)
        assert batch["tokens"].shape == (7, 17)
        assert (batch["weights"].shape, batch["weights"].dtype) == ((7, 16), np.float32)
        rows = batches.read(i, slice(2, 5))
        np.testing.assert_array_equal(rows["tokens"], batch["tokens"][2:5])
        targets.append(batch["tokens"][:, 1:][batch["weights"] == 1])
        assert (batch["tokens"][:, 1:][batch["weights"] == 0] == store.end_of_document_id).all()
    np.testing.assert_array_equal(np.concatenate(targets), stream(store)[1:])
    with pytest.raises(IndexError):
        batches.read(batches.num_batches)
    assert ValidationBatches(store, seq_len=seq_len, batch_size=7, max_batches=2).num_batches == 2


def test_a_validation_store_shorter_than_a_window(make_store):
    store = make_store(["ab"])
    batches = ValidationBatches(store, seq_len=100, batch_size=3, max_batches=5)
    assert batches.num_batches == 1
    assert batches.read(0)["weights"].sum() == store.num_tokens - 1


def test_a_store_too_short_to_train_on(make, make_store):
    store = make_store(["ab"])
    with pytest.raises(UserError, match=r"tokens are too few for one window of Train\.seq_len \+ 1 = 101"):
        make([(store, 1.0)], seq_len=100)
    batch = make([(store, 1.0)], seq_len=100, packing="documents").read(3)
    assert (batch["segments"] > 0).sum() == 4 * (store.num_tokens + 1)  # the one document, four times
