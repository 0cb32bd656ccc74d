"""Whole runs over several stores: every sample is trained on as often as it should, wherever the run is interrupted.

What was trained on is read from the tokens of the batches, found again in the stores, and from the digests that the
checkpoints hold of the batches after them.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
from programs import run_processes

from mtx.cli import main
from mtx.data import ledger
from mtx.data.batches import Batches
from mtx.data.course import Course
from mtx.data.samples import Sources
from mtx.data.store import open_store
from mtx.training.proof import batch_digest

SEQ_LEN = 32


@pytest.fixture(scope="module")
def stores(workplace):
    """Path -> store: two small ones, which a run goes through more than once, and the one of the other tests."""
    text = (workplace.folder / "validation.jsonl").read_text().splitlines()
    words = [json.loads(line)["text"].split() for line in text]
    paths = []
    for name, count, source in (("few", 250, words[0]), ("some", 350, words[1])):
        documents = [{"id": f"{name}/{i}", "text": " ".join(source[i : i + 25])} for i in range(0, count, 25)]
        path = workplace.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        out, tokenizer = str(workplace.folder / name), str(workplace.folder / "tokenizer.model")
        assert main(["data", "build", str(path), "--tokenizer", tokenizer, "--out", out, "--quiet"]) == 0
        paths.append(out)
    return {path: open_store(path) for path in paths}


def blend(stores, *weights):
    return repr(dict(zip(stores, map(float, weights))))


@pytest.fixture(scope="module")
def staged_settings(stores):
    few, some = stores
    stages = {"4 steps": {some: 1.0}, "2048 tokens": {some: 1.0, few: 3.0}}
    return [f"Data.train = {blend(stores, 2, 1)}", f"Data.stages = {stages!r}", "Train.steps = 12"]


@pytest.fixture(scope="module")
def staged(workplace, staged_settings):
    """A run through three stages, each of 4 steps."""
    workplace.train("staged", *staged_settings, "Checkpoint.every_steps = 2")
    return "staged"


class Trained:
    """What a run trained on: the sample of its store that each row of a batch is, by looking for its tokens there."""

    def __init__(self, workplace, name, stores):
        self.stores = stores
        entries = ledger.read_entries(workplace.folder / name)
        self.batches = Batches(Course(entries), Sources())
        self.windows = {}
        for path, store in stores.items():
            count = (store.num_tokens - 1) // SEQ_LEN
            for number, tokens in enumerate(store.read_windows(np.arange(count) * SEQ_LEN, SEQ_LEN + 1)):
                assert self.windows.setdefault(tokens.tobytes(), (path, number)) == (path, number)

    def samples(self, step):
        """(store, sample) of each row of a step, from 1."""
        rows = self.batches.read(step - 1)["tokens"]
        return [self.windows[row.astype(np.int32).tobytes()] for row in rows]

    def of(self, path, last):
        """The samples of a store in the order in which steps 1 to `last` read them."""
        return [number for step in range(1, last + 1) for store, number in self.samples(step) if store == path]

    def documents(self, step):
        """(store, document) -> targets in a step."""
        counts = Counter()
        for path, number in self.samples(step):
            targets = number * SEQ_LEN + 1 + np.arange(SEQ_LEN)
            for document in np.searchsorted(self.stores[path].document_ends, targets, side="right").tolist():
                counts[path, document] += 1
        return counts

    def assert_saved(self, workplace, name, steps):
        """The batches after these checkpoints are those that the run went on with; what they say was taken, was."""
        for step in steps:
            meta = workplace.meta(name, step)
            size = self.batches.course.size(step)
            assert meta["probe"]["batch"] == batch_digest(self.batches, step, size)
            taken = Counter(path for before in range(1, step + 1) for path, _ in self.samples(before))
            assert meta["samples"] == meta["ledger"]["samples"] == taken.total()
            assert meta["tokens"] == meta["ledger"]["tokens"] == taken.total() * SEQ_LEN
            assert meta["ledger"]["skipped_samples"] == 0
            assert {source["store"] for source in meta["ledger"]["sources"]} == self.stores.keys()
            for source in meta["ledger"]["sources"]:
                count, store = taken[source["store"]], self.stores[source["store"]]
                assert (source["samples"], source["tokens"], source["digest"]) == (count, count * SEQ_LEN, store.digest)
                assert source["epochs"] == count / ((store.num_tokens - 1) // SEQ_LEN)

    def assert_each_once(self, last):
        """Every sample once an epoch: none is lost and none comes twice. Returns the epochs of each store."""
        epochs = []
        for path, store in self.stores.items():
            read, count = self.of(path, last), (store.num_tokens - 1) // SEQ_LEN
            for first in range(0, len(read), count):
                epoch = read[first : first + count]
                assert len(set(epoch)) == len(epoch)
            epochs.append(len(read) / count)
        return epochs


def test_what_a_run_was_trained_on(workplace, staged, stores, capsys):
    trained = Trained(workplace, staged, stores)
    trained.assert_saved(workplace, staged, range(2, 13, 2))
    assert min(trained.assert_each_once(12)) > 1
    few, some = stores
    shares = [
        Counter(path for step in range(first, first + 4) for path, _ in trained.samples(step)) for first in (1, 5, 9)
    ]
    assert [(share[few], share[some]) for share in shares] == [(21, 11), (0, 32), (24, 8)]

    assert main(["data", "which", str(workplace.folder / staged), "--steps", "1..12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps_done"] == 12
    found = {step: Counter() for step in range(1, 13)}
    for document in answer["documents"]:
        found[document["step"]][document["store"], document["document"]] += document["tokens"]
    assert found == {step: trained.documents(step) for step in range(1, 13)}


def kill_and_go_on(workplace, name, steps, *settings):
    """A run that is killed when it has begun to save, so that the checkpoint before that one is complete."""
    for step in steps:
        assert workplace.train(name, *settings, check=False, MTX_FAULT=f"kill:step:{step}").returncode == -9
    workplace.train(name, *settings)


def test_killed_in_a_stage(workplace, staged, staged_settings):
    """In the second stage, the only one whose blend is that of one store."""
    name = "killed once"
    kill_and_go_on(workplace, name, [9], *staged_settings, "Checkpoint.every_steps = 2")
    assert_same_run(workplace, name, staged, [6])


@pytest.mark.slow
def test_killed_in_each_stage(workplace, staged, staged_settings):
    name = "killed thrice"
    kill_and_go_on(workplace, name, [5, 9, 11], *staged_settings, "Checkpoint.every_steps = 2")
    assert_same_run(workplace, name, staged, [2, 6, 8])


def assert_same_run(workplace, name, staged, resumed):
    events = workplace.events(name, "resumed")
    assert [event["step"] for event in events] == resumed
    assert all(event["proof"] == {"arrays": "equal", "batch": "equal", "step": "bit-equal"} for event in events)
    assert workplace.losses(name) == workplace.losses(staged)
    for figure in ("ledger", "data", "tokens", "samples", "digests", "probe"):
        assert workplace.meta(name, 12)[figure] == workplace.meta(staged, 12)[figure]
    assert (workplace.folder / name / ledger.NAME).read_bytes() == (
        workplace.folder / staged / ledger.NAME
    ).read_bytes()


@pytest.mark.slow
def test_another_blend_and_another_batch_size(workplace, stores):
    """Each store goes on where it stood."""
    name, first = "blended", f"Data.train = {blend(stores, 1, 1)}"
    workplace.train(name, first, "Train.steps = 6", "Checkpoint.every_steps = 2")
    before = Trained(workplace, name, stores)
    config = (workplace.folder / name / "config.gin").read_bytes()

    second = f"Data.train = {blend(stores, 1, 4)}"
    settings = [second, "Train.steps = 10", "Checkpoint.every_steps = 2"]
    assert "add --accept Data.train\n" in workplace.train(name, *settings, check=False).stderr
    assert (workplace.folder / name / "config.gin").read_bytes() == config
    workplace.train(name, *settings, options=["--accept", "Data.train"])
    (accepted,) = workplace.events(name, "accepted")
    assert [line.partition(":")[0] for line in accepted["changes"]] == ["Data.train"]
    (resumed,) = workplace.events(name, "resumed")
    assert resumed["proof"] == {
        "arrays": "equal",
        "batch": "changed (Data.train accepted)",
        "step": "not comparable: Data.train accepted",
    }

    settings = [second, "Train.steps = 14", "Checkpoint.every_steps = 2", "Train.global_batch_size = 12"]
    workplace.train(name, *settings, options=["--accept", "Train.global_batch_size"])
    trained = Trained(workplace, name, stores)
    trained.assert_saved(workplace, name, [8, 12, 14])
    assert [len(trained.samples(step)) for step in (6, 7, 10, 11, 14)] == [8, 8, 8, 12, 12]
    assert min(trained.assert_each_once(14)) > 1
    for step in range(1, 7):
        assert trained.samples(step) == before.samples(step)
    for path in stores:
        # The order of a store is that of the run that nothing changed: it is only read sooner or later.
        read, unchanged = trained.of(path, 14), before.of(path, 40)
        assert read == unchanged[: len(read)]
    some = [Counter(path for path, _ in trained.samples(step))[list(stores)[1]] for step in (5, 6)]
    assert some == [4, 4]
    assert sum(Counter(path for path, _ in trained.samples(step))[list(stores)[1]] for step in range(11, 15)) in (
        38,
        39,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 4), (2, 2)])
def test_other_devices_and_processes(workplace, staged, staged_settings, stores, count, devices):
    """They read their shares of the same batches, from a checkpoint in the second stage on."""
    name = f"over {count} processes with {devices} devices"
    workplace.copy(staged, name)
    settings = [*staged_settings, "Checkpoint.every_steps = 2"]
    command = [*workplace.command(name, *settings, devices=devices), "--resume", "6"]
    run_processes(command, count=count, env=workplace.environment(devices))
    (resumed,) = workplace.events(name, "resumed")
    assert (resumed["step"], resumed["proof"]["batch"]) == (6, "equal")
    assert re.fullmatch(r"within \de-0[678] of 1e-0[45]", resumed["proof"]["step"])
    Trained(workplace, name, stores).assert_saved(workplace, name, [8, 10, 12])
    for step in (8, 10, 12):
        assert workplace.meta(name, step)["probe"]["batch"] == workplace.meta(staged, step)["probe"]["batch"]
    moved, expected = ([loss for _, _, loss in workplace.losses(run)] for run in (name, staged))
    np.testing.assert_allclose(moved, expected, rtol=3e-5)
