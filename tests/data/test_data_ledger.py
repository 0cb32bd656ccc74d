"""The ledger: entries come back as they were recorded, damage is found, and a run gets the entry that it needs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from data.entries import THREE, TWO, make_entry

from mtx.config import reader
from mtx.config.schema import BatchRamp
from mtx.data import ledger
from mtx.data.batches import Batches
from mtx.data.course import Course
from mtx.data.entry import Content, Entry
from mtx.data.samples import Sources
from mtx.data.training import open_training_data
from mtx.errors import UserError


def test_entries_come_back(tmp_path):
    assert ledger.read_entries(tmp_path) == []
    entries = [
        make_entry(0, TWO, ramp=BatchRamp(start=1, increment=1, tokens=5), stages={"5 steps": {"c": 1 / 3}}),
        make_entry(9, TWO, skipped_samples=4, cause="loss 9.1 \u2260 3.0\n"),
        make_entry(9, THREE, packing="documents"),
    ]
    for number, entry in enumerate(entries):
        before = (tmp_path / ledger.NAME).read_bytes() if number else b""
        ledger.append(tmp_path, entry)
        assert (tmp_path / ledger.NAME).read_bytes().startswith(before)
    assert ledger.read_entries(tmp_path) == [entries[0], entries[2]]
    assert list(ledger.read_entries(tmp_path)[1].stores) == ["a", "b", "c"]  # numbers follow from this order


def test_damage_is_found(tmp_path):
    for step in (0, 5, 9):
        ledger.append(tmp_path, make_entry(step, TWO))
    path = tmp_path / ledger.NAME
    whole = path.read_bytes()
    lengths = [len(line) for line in whole.splitlines(keepends=True)]
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, len(whole), 60), lengths[0] - 1, lengths[0] - 2, len(whole) - 2]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(7)
        path.write_bytes(damaged)
        line = 1 + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        with pytest.raises(UserError, match=rf"ledger\.jsonl:{line}: a damaged entry"):
            ledger.read_entries(tmp_path)
    path.write_bytes(whole[: sum(lengths[:2]) + 40])
    with pytest.raises(UserError, match=r"ledger\.jsonl:3: a damaged entry"):
        ledger.read_entries(tmp_path)
    path.write_bytes(whole[lengths[0] :])
    with pytest.raises(UserError, match="first entry holds from step 5"):
        ledger.read_entries(tmp_path)


def test_an_append_that_fails_changes_nothing(tmp_path, monkeypatch):
    ledger.append(tmp_path, make_entry())
    whole = (tmp_path / ledger.NAME).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"ledger\.jsonl cannot be written: No space"):
            ledger.append(tmp_path, make_entry(3))
    assert (tmp_path / ledger.NAME).read_bytes() == whole
    ledger.append(tmp_path, make_entry(3))
    assert [entry.step for entry in ledger.read_entries(tmp_path)] == [0, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step = -1"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"global_batch_size": True}, "global_batch_size = True"),
        ({"packing": "bags"}, "packing = 'bags'"),
        ({"train": {}}, "train = {}"),
        ({"train": {"a": -1.0}}, "train = "),
        ({"stages": {"soon": {"a": 1.0}}}, "'soon' is no beginning"),
        ({"stages": {"4 steps": {"q": 1.0}}}, "stores are not those"),
        ({"stores": {"a": {"digest": "a"}}}, "stores = "),
        ({"batch_ramp": {"start": 1, "increment": 1}}, "batch_ramp = "),
        ({"cause": 4}, "cause = 4"),
        ({"colour": 4}, "colour"),
    ],
)
def test_what_is_no_entry(change, message):
    record = json.loads(json.dumps(make_entry().to_json()))
    assert Entry.from_json(record) == make_entry()
    with pytest.raises(ValueError, match=message):
        Entry.from_json(record | change)


@pytest.fixture
def sources():
    return Sources()


def test_the_next_entry(write_store, make_run, sources, tmp_path):
    a, b = (write_store(name, [20] * 50, seed=seed).path for seed, name in enumerate("ab"))
    run = make_run({a: 1.0}, stages={"1_000 steps": {b: 1.0}})
    start = ledger.next_entry([], run, sources, 500)
    assert (start.step, list(start.stores)) == (0, [str(a), str(b)])
    assert start.stores[str(a)] == Content(sources.open(str(a)).digest, (50 * 21 - 1) // 16)
    assert ledger.next_entry([start], run, sources, 500) is None
    assert ledger.next_entry([start], make_run({a: 1.0}, stages={"1e3 steps": {b: 1.0}}), sources, 500) is None
    changed = make_run({a: 1.0, b: 1.0})
    entry = ledger.next_entry([start], changed, sources, 500)
    assert (entry.step, entry.train) == (500, {str(a): 1.0, str(b): 1.0})
    # Back before the change: as it was then, or as it is now, but from there on.
    entries = [start, entry]
    assert ledger.next_entry(entries, changed, sources, 700) is None
    assert ledger.next_entry(entries, run, sources, 400).step == 400
    assert ledger.next_entry(entries, changed, sources, 400).step == 400
    # A skip is no setting: it stays, also where the settings change at its step.
    entries = [start, ledger.skip([start], 300, 310, "spike")]
    assert ledger.next_entry(entries, run, sources, 300) is None
    assert ledger.next_entry(entries, run, sources, 200) is None
    entry = ledger.next_entry(entries, changed, sources, 300)
    assert (entry.step, entry.skipped_samples, entry.cause) == (300, 40, "spike")
    assert ledger.next_entry(entries, changed, sources, 400).skipped_samples == 0


def test_a_store_that_moved_is_the_same_and_one_that_changed_is_not(write_store, make_run, tmp_path):
    path, moved = write_store("a", [20] * 50).path, tmp_path / "moved"
    start = ledger.next_entry([], make_run({path: 1.0}), Sources(), 0)
    expected = Batches(Course([start]), Sources()).read(7)["tokens"]
    path.rename(moved)
    run, opened = make_run({moved: 2.0}), Sources()
    assert ledger.next_entry([start], make_run({moved: 1.0}), opened, 5) is None
    np.testing.assert_array_equal(Batches(Course([start]), opened).read(7)["tokens"], expected)
    entry = ledger.next_entry([start], run, opened, 5)
    np.testing.assert_array_equal(Batches(Course([start, entry]), opened).read(7)["tokens"], expected)
    assert ledger.changed_stores([start], run, opened, 5) == {}
    # Another store where the first one was: what was read before cannot be read again, what comes can.
    old, new = opened.open(str(moved)).digest[:12], write_store("a", [20] * 60, seed=5)
    run, opened = make_run({path: 1.0}), Sources()
    assert ledger.changed_stores([start], run, opened, 5) == {
        "Data.train": f"{path} has other content than when the run read it (digest {old} -> {new.digest[:12]})"
    }
    entry = ledger.next_entry([start], run, opened, 5)
    batches = Batches(Course([start, entry]), opened)
    alone = replace(entry, step=0)
    assert batches.course.numbers == {start.stores[str(path)].digest: 0, new.digest: 1}
    first, again = batches.read(5)["tokens"], Batches(Course([start, entry]), Sources()).read(5)["tokens"]
    np.testing.assert_array_equal(first, again)
    assert (first != Batches(Course([alone]), opened).read(0)["tokens"]).any()  # it is source 1 here, and 0 there
    with pytest.raises(UserError, match="has other content than when the run read it"):
        batches.read(4)
    shutil.rmtree(path)
    with pytest.raises(UserError, match="no such token store"):
        Batches(Course([start, entry]), Sources()).read(4)


def test_the_same_content_twice(write_store, make_run, tmp_path, sources):
    path = write_store("a", [20] * 50).path
    shutil.copytree(path, tmp_path / "copy")
    with pytest.raises(UserError, match=r"Data\.train: .*a and .*copy hold the same: keep one"):
        Entry.of(make_run({path: 1.0, tmp_path / "copy": 1.0}), sources, 0)
    entry = Entry.of(make_run({path: 1.0}, stages={"3 steps": {tmp_path / "copy": 1.0}}), sources, 0)
    assert len(Course([entry]).numbers) == 1


CONFIG = """
Model.vocab_size = 500
Model.d_model = 8
Model.num_layers = 1
Model.num_heads = 1
Model.max_seq_len = 4
Train.seq_len = 4
Train.global_batch_size = 3
Data.train = {'a': 1.0}
Data.stages = {'20 steps': {'a': 1.0, 'b': 1.0}}
Data.validation = {'a': 'a'}
"""


def test_training_data(make_store, tmp_path, monkeypatch):
    """By the run alone, or by its ledger; a stage that never comes is refused by what the run really was so far."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        make_store(["some text and more of it"] * 30, name=name)
    load = lambda *settings: reader.load_text(CONFIG, "run.gin", settings).run  # noqa: E731
    run = load("Train.steps = 40")
    data, sources = open_training_data(run), Sources()
    assert data.train.course is data.sizes
    assert (data.sizes.blend(19), data.sizes.blend(20)) == (run.data.train, run.data.stages["20 steps"])
    assert (data.sizes.max, data.validation["a"].read(0)["tokens"].shape) == (3, (3, 5))
    entries = [Entry.of(run, sources, 0), Entry.of(load("Train.steps = 40", "Train.global_batch_size = 5"), sources, 7)]
    data = open_training_data(run, entries, sources)
    assert (data.sizes.size(6), data.sizes.size(7), data.sizes.max) == (3, 5, 5)
    with pytest.raises(UserError, match=r"Data\.stages\['20 steps'\] has no effect: .* after 20 steps, .* has 19: "):
        open_training_data(load(f"Train.tokens = {19 * 3 * 4}"))
    longer = load(f"Train.tokens = {(7 * 3 + 13 * 5) * 4 + 1}")  # 21 steps with the ledger, and more without
    assert open_training_data(longer, entries, sources).sizes.step_at_tokens(longer.train.tokens) == 21
    shutil.rmtree("b")
    with pytest.raises(UserError, match="b: no such token store"):
        open_training_data(run)
