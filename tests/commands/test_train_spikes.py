"""Runs that go back: a batch that does not belong is found, skipped for good, and leaves no trace in what follows."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
from programs import run, run_processes

from mtx.checkpoints.run_directory import RunDirectory
from mtx.data import integrity
from mtx.data.arrays import CHUNK, ArrayWriter
from mtx.data.course import Course, order_key
from mtx.data.ledger import read_entries
from mtx.data.shuffle import permute
from mtx.health.journal import read_journal

SEQ_LEN, BATCH, SAMPLES, STEPS = 32, 8, 500, 54
BAD = (45, 46)
"""Batches, counted from 0, that hold noise. The checkpoint before them is that of step 44."""


def write_store(workplace, name, noise):
    """A store of one phrase over and over, but for the batches of a straight run that `noise` maps to their tokens."""
    path, source = workplace.folder / name, workplace.folder / "train"
    tokens = np.resize(np.arange(100, 108), SAMPLES * SEQ_LEN + 1).astype(np.uint16)
    for batch, values in noise.items():
        places = np.arange(batch * BATCH, (batch + 1) * BATCH)[:3]
        for number in permute(places, SAMPLES, order_key(0, 0, 0)).tolist():
            tokens[number * SEQ_LEN + 1 : (number + 1) * SEQ_LEN] = values
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("tokens", "document_ends", "manifest.json"))
    for part, array in {"tokens": tokens, "document_ends": np.array([len(tokens)], np.int64)}.items():
        writer = ArrayWriter(path / part, dtype=array.dtype, length=len(array), shard=CHUNK)
        writer.append(array)
        writer.close()
    manifest = integrity.read_manifest(source)
    integrity.seal(path, {**manifest, "num_tokens": len(tokens), "num_documents": 1})


@pytest.fixture(scope="module")
def noisy(workplace):
    """The settings of a run over data with noise."""
    rng = np.random.default_rng(0)
    write_store(workplace, "noisy", {batch: rng.integers(110, 380, SEQ_LEN - 1) for batch in BAD})
    return [
        f"Data.train = {{'{workplace.folder}/noisy': 1.0}}",
        f"Train.steps = {STEPS}",
        "Train.dropout = 0.0",
        "WarmupCosine.decay_steps = 50",
        "Health.spike_score = 8.0",
        "Health.spike_window = 32",
    ]


@pytest.fixture(scope="module")
def healed(workplace, noisy):
    """A run that went back twice."""
    workplace.train("healed", *noisy)
    return "healed"


def events(workplace, name, *kinds):
    return [event for event in read_journal(workplace.folder / name) if event["event"] in kinds]


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def samples_of(course, step):
    """The places of a step's samples in the order of the only source."""
    (draw,) = course.draws(step, np.arange(course.size(step)))
    return (draw.places + draw.epochs * draw.num_samples).tolist()


def test_a_spike_is_undone(workplace, healed):
    found = events(workplace, healed, "start", "spike", "rollback", "finished")
    assert [(event["event"], event["step"]) for event in found] == [
        ("start", 0), ("spike", 46), ("rollback", 44), ("spike", 45), ("rollback", 44), ("finished", STEPS),
    ]  # fmt: skip
    first, second = (event for event in found if event["event"] == "rollback")
    assert (first["from_step"], first["skipped_samples"]) == (46, 2 * BATCH)
    assert (second["from_step"], second["skipped_samples"]) == (45, BATCH)
    assert "robust standard deviations" in first["cause"]
    (entry,) = (entry for entry in read_entries(workplace.folder / healed) if entry.step)
    assert (entry.step, entry.skipped_samples, entry.cause) == (44, 3 * BATCH, second["cause"])


def test_what_was_skipped_is_never_trained_on(workplace, healed):
    course = Course(read_entries(workplace.folder / healed))
    trained = [sample for step in range(STEPS) for sample in samples_of(course, step)]
    assert trained == [*range(44 * BATCH), *range(47 * BATCH, (STEPS + 3) * BATCH)]
    meta = json.loads((workplace.folder / healed / "checkpoints" / str(STEPS) / "manifest.json").read_text())["meta"]
    assert (meta["ledger"]["samples"], meta["ledger"]["skipped_samples"]) == (STEPS * BATCH, 3 * BATCH)


def test_metrics_of_a_run_that_went_back(workplace, healed):
    folder = workplace.folder / healed
    losses = workplace.losses(healed)
    assert [step for step, name, _ in losses if name is None] == list(range(1, STEPS + 1))
    assert max(loss for step, name, loss in losses if name is None and step > 16) < 1
    assert steps_of(folder / "metrics.before-resume-1.jsonl") == [45]
    assert not (folder / "metrics.before-resume-2.jsonl").exists()  # that spike was found before a line was written
    report = json.loads(run(["-m", "mtx", "report", str(folder), "--json"]).stdout)
    assert (report["runs"][0]["rollbacks"], report["runs"][0]["data"][0]["skipped_samples"]) == (2, 3 * BATCH)
    assert "back to step 44; 16 samples left out" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_killed_around_a_spike_is_bit_equal(workplace, noisy, healed):
    """Before the spike is read, after going back and before the next checkpoint, after that one."""
    fired = str(workplace.folder / "fired")
    faults = {"MTX_FAULT": "kill:step:47;kill:step:48;kill:step:50", "MTX_FAULT_FIRED": fired}
    command, env = workplace.command("killed", *noisy), workplace.environment(**faults)
    codes = [run(command, env=env, check=False).returncode for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert workplace.losses("killed") == workplace.losses(healed)
    one, other = workplace.state("killed", STEPS), workplace.state(healed, STEPS)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
    assert len(events(workplace, "killed", "rollback")) == 2


@pytest.mark.slow
def test_two_processes_go_back_together(workplace, noisy, healed):
    name = "healed-by-two"
    run_processes(workplace.command(name, *noisy), count=2, env=workplace.environment())
    went_back = [(event["from_step"], event["step"]) for event in events(workplace, name, "rollback")]
    assert went_back == [(46, 44), (45, 44)]
    losses, expected = ([loss for _, _, loss in workplace.losses(one)] for one in (name, healed))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 1])
def test_tries_are_bounded(workplace, noisy, most):
    name = f"at-most-{most}"
    process = workplace.train(name, *noisy, f"Health.max_rollbacks = {most}", check=False)
    assert process.returncode == 3
    assert f"The tries from step 44 are used up (Health.max_rollbacks = {most}), so the run ends" in process.stderr
    assert "Traceback" not in process.stderr
    directory = RunDirectory.open(workplace.folder / name)
    with directory.checkpoints(read_only=True) as checkpoints:
        assert checkpoints.steps() == [*range(8, 45, 4)]  # the last ten
        assert checkpoints.verify(44) == []


POISON = """
import sys
import numpy as np
from mtx.cli import main
from mtx.training import loop
make = loop.make_train_batch
places = [int(word) for word in sys.argv[1].split(",")]
def poison(setup, reader, sizes, step):
    batch = make(setup, reader, sizes, step)
    if next(sizes.draws(step, np.arange(1))).places[0] in places:
        batch["weights"] = batch["weights"] * np.float32("nan")
    return batch
loop.make_train_batch = poison
sys.exit(main(sys.argv[2:]))
"""
"""Trains, with weights of the loss that are no numbers in those batches that begin with certain samples."""


def train_poisoned(workplace, name, *settings):
    # Only batches of a ramp have weights. It has 4 sequences in the first two steps: step i begins at 8 * (i - 1).
    ramp = [
        "Train.batch_ramp = @BatchRamp()",
        "BatchRamp.start = 4",
        "BatchRamp.increment = 4",
        "BatchRamp.tokens = 256",
    ]
    command = workplace.command(name, *ramp, "Train.microbatch_size = 4", *settings)
    return run(["-c", POISON, "32,40", *command[2:]], env=workplace.environment())


def test_updates_that_are_not_finite_are_left_out(workplace):
    train_poisoned(workplace, "poisoned")
    assert [event["step"] for event in events(workplace, "poisoned", "skipped", "spike")] == [6, 7]
    losses = {step: loss for step, name, loss in workplace.losses("poisoned") if name is None}
    assert [step for step, loss in losses.items() if loss is None] == [6, 7]
    assert losses[20] < losses[5]
    with (workplace.folder / "poisoned" / "metrics.jsonl").open() as file:
        assert "NaN" not in file.read()


@pytest.mark.slow
def test_too_many_of_them_are_a_spike(workplace):
    train_poisoned(workplace, "too-poisoned", "Health.max_nonfinite = 1")
    skipped, spike, rollback = events(workplace, "too-poisoned", "skipped", "spike", "rollback")
    assert (skipped["step"], spike["step"]) == (6, 7)
    assert (rollback["step"], rollback["from_step"], rollback["skipped_samples"]) == (4, 7, 24)
    assert all(loss is not None for _, _, loss in workplace.losses("too-poisoned"))


def test_nothing_to_go_back_to(workplace):
    """A learning rate that ruins the parameters in the first step, before there is a checkpoint."""
    process = workplace.train("ruined", "WarmupCosine.peak = 1e30", check=False)
    assert process.returncode == 3
    assert "No checkpoint is older than that, so there is nothing to go back to" in process.stderr
    assert "Traceback" not in process.stderr


def test_the_best_checkpoint_stays(workplace, noisy):
    """A phrase learned by heart is no good for chapters: the best one is among the first."""
    keep = ["Train.eval_every = 4", "Checkpoint.keep_last = 1"]
    workplace.train("best", *noisy, *keep, "Checkpoint.keep_best = 'later chapters'")
    validation = {step: loss for step, name, loss in workplace.losses("best") if name}
    best = min(validation, key=validation.get)
    assert best < BAD[0]
    with RunDirectory.open(workplace.folder / "best").checkpoints(read_only=True) as checkpoints:
        assert checkpoints.steps() == [best, STEPS]
        assert checkpoints.meta(best)["validation"] == {"later chapters": validation[best]}
