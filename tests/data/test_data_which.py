"""Which documents were in which steps, against the tokens of the batches themselves."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtx.cli import main
from mtx.config import reader
from mtx.data import ledger, which
from mtx.data.batches import Batches
from mtx.data.course import Course
from mtx.data.entry import Entry
from mtx.data.samples import Sources
from mtx.errors import UserError

STEPS = 60
CONFIG = """
Model.vocab_size = 65536
Model.d_model = 8
Model.num_layers = 1
Model.num_heads = 1
Model.max_seq_len = 16
Train.seq_len = 16
Train.global_batch_size = 4
Train.steps = 60
Data.train = {'a': 2.0, 'b': 1.0}
Data.stages = {'20 steps': {'b': 1.0}, '2000 tokens': {'b': 1.0, 'c': 2.0}}
"""
FIRST = {"a": 1, "b": 20_000, "c": 40_000}


@pytest.fixture
def stores(write_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    return {name: write_store(name, rng.integers(1, 70, 40), first=first) for name, first in FIRST.items()}


@pytest.fixture
def make_run_dir(stores, tmp_path):
    """make_run_dir(packing) -> run directory with a skip, another batch size and another order in its ledger."""

    def make(packing="windows"):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.gin").write_text(f"{CONFIG}Data.packing = {packing!r}\n")
        entry = Entry.of(reader.load(folder / "config.gin").run, Sources(), 0)
        skip = ledger.skip([entry], 25, 28, "spike")
        wide = Entry.of(reader.load(folder / "config.gin", ["Train.global_batch_size = 7"]).run, Sources(), 31)
        other = Entry.of(reader.load(folder / "config.gin", ["Train.seed = 5", "Train.seq_len = 9"]).run, Sources(), 47)
        for one in (entry, skip, wide, other):
            ledger.append(folder, one)
        return folder

    return make


def count_targets(batches, stores, step):
    """(store, document) -> targets in a step, by looking where each of them is from."""
    batch = batches.read(step - 1)
    is_target = batch["positions"][:, 1:] > 0 if "positions" in batch else np.ones_like(batch["tokens"][:, 1:], bool)
    counts = Counter()
    for token in batch["tokens"][:, 1:][is_target].tolist():
        name = max((name for name in FIRST if FIRST[name] <= token), key=FIRST.get)
        document = int(np.searchsorted(stores[name].document_ends, token - FIRST[name], side="right"))
        counts[name, document] += 1
    return counts


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_documents_and_steps(make_run_dir, stores, packing):
    batches = which.open_batches(make_run_dir(packing))
    every = which.find_stores(batches)
    assert list(every.values()) == ["a", "b", "c"]
    expected = {step: count_targets(batches, stores, step) for step in range(1, STEPS + 1)}
    for step, counts in expected.items():
        found = which.documents_of(batches, step, every)
        assert {(one.store, one.document): one.tokens for one in found} == counts
        assert [one.tokens for one in found] == sorted(counts.values(), reverse=True)
        assert all(one.id == f"{one.store}/{one.document}" and one.step == step for one in found)
    for name in FIRST:
        only = which.find_stores(batches, name)
        found = which.documents_of(batches, 45, only)
        assert {(one.store, one.document): one.tokens for one in found} == {
            key: count for key, count in expected[45].items() if key[0] == name
        }
        for document in (0, 1, 17, 39):
            for first, last in ((1, STEPS), (22, 22), (19, 33)):
                found = which.steps_with(batches, only, document, first, last)
                steps = range(first, last + 1)
                assert {one.step: one.tokens for one in found} == {
                    step: expected[step][name, document] for step in steps if expected[step][name, document]
                }
                assert found == which.steps_with(batches, every, f"{name}/{document}", first, last)


def test_no_token_is_read(make_run_dir, stores, monkeypatch):
    """Steps far away are as near as others, and a step has the documents of all its rows."""
    folder = make_run_dir()
    monkeypatch.setattr("mtx.data.store.Store.read_spans", None)
    batches = which.open_batches(folder)
    step = 10**9
    found = which.documents_of(batches, step, which.find_stores(batches))
    assert sum(one.tokens for one in found) == 4 * 9
    again = which.steps_with(batches, which.find_stores(batches, found[0].store), found[0].document, step, step)
    assert again == [found[0]]


def test_without_a_ledger(make_run_dir, stores):
    """A run from before there was one read what its config says."""
    folder = make_run_dir()
    (folder / ledger.NAME).unlink()
    batches = which.open_batches(folder)
    entry = Entry.of(reader.load(folder / "config.gin").run, Sources(), 0)
    again = Batches(Course([entry]), Sources())
    np.testing.assert_array_equal(batches.read(50)["tokens"], again.read(50)["tokens"])


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["data", "which", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command(make_run_dir, stores, run):
    folder = make_run_dir()
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    (folder / "checkpoints/12").mkdir(parents=True)
    batches = which.open_batches(folder)
    code, out, err = run(folder, "--steps", "11..13", "--json")
    answer = json.loads(out)
    assert (code, err, answer["steps"], answer["steps_done"]) == (0, "", [11, 13], 12)
    for step in (11, 12, 13):
        counts = {(one["store"], one["document"]): one["tokens"] for one in answer["documents"] if one["step"] == step}
        assert counts == count_targets(batches, stores, step)
    code, out, _ = run(folder, "--steps", "12..13", "--limit", "1")
    lines = out.splitlines()
    assert code == 0
    assert [line.startswith("step 1") for line in lines] == [True, False, False] * 2
    assert [line.endswith("; planned, the run has done 12") for line in lines] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert lines[2].endswith(" documents more")
    code, out, _ = run("b", "--run", folder, "--id", "b/3", "--json")
    found = json.loads(out)["documents"]
    assert found
    assert {(one["store"], one["document"], one["id"]) for one in found} == {("b", 3, "b/3")}
    assert all(count_targets(batches, stores, one["step"])["b", 3] == one["tokens"] for one in found)
    assert run("b", "--run", folder, "--document", "3", "--json")[1] == out
    assert run("c", "--run", folder, "--steps", "7") == (0, "none in steps 7 to 7\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "which steps? --steps 7"),
        (["run", "--id", "a/1"], "which steps? --steps 7"),
        (["run", "--steps", "0..3"], "expected a positive integer, not '0'"),
        (["run", "--steps", "3..2"], "expected steps such as 7 or 7..9, not '3..2'"),
        (["run", "--steps", "3.."], "expected steps such as 7 or 7..9, not '3..'"),
        (["run", "--steps", "3", "--document", "1"], "document 1 of which store?"),
        (["run", "--steps", "3", "--id", "q"], "no document has the id 'q'"),
        (["a", "--run", "run", "--steps", "3", "--document", "40"], "no document 40; it has 0 to 39"),
        (["other", "--run", "run", "--steps", "3"], "the run reads no store with this content; it reads a, b, c"),
        (["a", "--steps", "3"], "config.gin"),
        (["absent", "--steps", "3"], "absent"),
    ],
)
def test_mistakes(make_run_dir, stores, write_store, run, arguments, message):
    make_run_dir()
    write_store("other", [30])
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_store_that_is_gone(make_run_dir, stores):
    """Matters for the steps and stores that are asked for alone."""
    folder = make_run_dir()
    Path("c").rename("elsewhere")
    batches = which.open_batches(folder)
    assert which.documents_of(batches, 3, which.find_stores(batches))
    assert which.documents_of(batches, 45, which.find_stores(batches, "b"))
    with pytest.raises(UserError, match="c: no such token store"):
        which.documents_of(batches, 45, which.find_stores(batches))
    assert which.find_stores(batches, "elsewhere").keys() < which.find_stores(batches).keys()
    batches.sources.open("elsewhere")
    assert which.documents_of(batches, 45, which.find_stores(batches))
