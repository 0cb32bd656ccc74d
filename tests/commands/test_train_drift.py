"""A run that goes on with another config: asked about, agreed to, written down; nobody else writes there meanwhile."""

from __future__ import annotations

import re
import signal
import time

import pytest
from programs import start

from mtx.cli import main
from mtx.config.reader import load

DECAY = "AdamW.weight_decay = 0.2"


@pytest.fixture
def refused(workplace, capsys):
    """refused(name, *settings, options=()) -> the message, in one line; the run directory is as it was."""

    def train(name, *settings, options=()):
        before = workplace.content(name)
        sets = [part for setting in settings for part in ("--set", setting)]
        run_dir = ["--run-dir", str(workplace.folder / name)]
        assert main(["train", str(workplace.config), *run_dir, "--quiet", *options, *sets]) == 2
        assert workplace.content(name) == before
        return re.sub(r"\s+", " ", capsys.readouterr().err)

    return train


def weight_decay(path):
    return load(path).run.train.optimizer.weight_decay


def test_math_is_asked_about_and_written_down(workplace, straight, refused):
    name, old = "drifted", (workplace.folder / straight / "config.gin").read_bytes()
    folder = workplace.copy(straight, name)
    begin = len(workplace.events(name, "accepted"))
    was = weight_decay(folder / "config.gin")
    line = f"AdamW.weight_decay: {was} -> 0.2 (changes the math, set at <command line>)"
    message = refused(name, DECAY)
    assert f"the config differs from that of its checkpoint 20 in {line} If that is meant, add" in message
    assert "add --accept AdamW.weight_decay If not, go on with" in message
    assert "checkpoint 16" in refused(name, DECAY, options=["--resume", "16", "--accept", "Train.seed"])

    accept = ["--resume", "16", "--accept", "AdamW.weight_decay"]
    workplace.train(name, DECAY, "Train.steps = 18", options=accept)
    (accepted,) = workplace.events(name, "accepted")[begin:]
    assert (accepted["step"], accepted["changes"]) == (16, [line])
    (resumed,) = workplace.events(name, "resumed")
    assert resumed["proof"] == {
        "arrays": "equal", "batch": "equal", "step": "bit-equal"
    }  # fmt: skip
    assert (folder / "config.until-16.gin").read_bytes() == old
    assert weight_decay(folder / "config.gin") == 0.2
    losses = {record["step"]: record["loss"] for record in workplace.records(straight) if "eval" not in record}
    changed = {record["step"]: record["loss"] for record in workplace.records(name) if "eval" not in record}
    assert (changed[17], changed[18] == losses[18]) == (losses[17], False)  # the step before is not changed by it

    # What the run has agreed to, a restart need not repeat, also where no later checkpoint knows of it.
    workplace.train(name, DECAY, "Train.steps = 18", options=["--resume", "16"])
    assert workplace.events(name, "accepted")[-1]["changes"] == [line]
    assert {record["step"]: record["loss"] for record in workplace.records(name) if "eval" not in record} == changed

    # What counts is the checkpoint that the run goes on from.
    assert "differs from that of its checkpoint 18 in AdamW.weight_decay: 0.2 -> " in refused(name, "Train.steps = 19")
    workplace.train(name, "Train.steps = 18", options=["--resume", "16"])
    assert len(workplace.events(name, "accepted")) == begin + 2
    assert workplace.events(name, "resumed")[-1]["proof"]["step"] == "bit-equal"
    assert weight_decay(folder / "config.gin") == was
    assert weight_decay(folder / "config.until-16-2.gin") == 0.2


def test_data_are_asked_about(workplace, straight, refused):
    folder = workplace.folder
    message = refused(straight, f"Data.train = {{'{folder}/train': 3.0, '{folder}/validation': 1.0}}")
    assert f"Data.train: {{'{folder}/train': 1.0}} -> " in message
    assert "(changes the data, set at <command line>)" in message
    assert "add --accept Data.train If not," in message
    message = refused(straight, "Train.global_batch_size = 16", "Train.seed = 3", options=["--accept", "Train.seed"])
    assert "add --accept Train.global_batch_size If not," in message
    assert "Train.seed" not in message


def test_what_cannot_change(workplace, straight, refused):
    options = ["--accept", "Model.d_ff", "--accept", "AdamW.weight_decay"]
    message = refused(straight, "Model.d_ff = 64", DECAY, options=options)
    assert "cannot go on with this config" in message
    assert "Model.d_ff: None -> 64 (impossible, set at <command line>)" in message
    assert "AdamW.weight_decay" not in message
    assert "--accept" not in message
    message = refused(straight, options=["--accept", "Train.sed"])
    assert "--accept Train.sed: no such field" in message
    assert "Train.seed" in message


def test_a_longer_run(workplace, straight, refused):
    """The length counts by the learning rates that it gives."""
    name, bent = "longer", "WarmupCosine.decay_steps = None"
    workplace.train(name, "Train.steps = 6", bent)
    message = refused(name, "Train.steps = 8", bent)
    assert (
        "Train.steps: 6 -> 8 (changes the math, set at <command line>); the schedule ends with the run: set " in message
    )
    assert "set WarmupCosine.decay_steps = 6 to keep it" in message
    assert "add --accept Train.steps If not," in message

    workplace.train(name, "Train.steps = 8", "WarmupCosine.decay_steps = 6")
    assert workplace.events(name, "accepted") == []
    assert workplace.events(name, "resumed")[-1]["proof"]["step"] == "bit-equal"
    rates = [
        record["learning_rate"] for record in workplace.records(name) if record["step"] > 6 and "eval" not in record
    ]
    assert rates == pytest.approx([1e-3, 1e-3])


def test_two_runs_in_one_directory(workplace, straight, refused):
    name = "crowded"
    workplace.copy(straight, name)
    process = start(workplace.command(name, "Train.steps = 1000000"), env=workplace.environment())
    try:
        deadline, lock = time.monotonic() + 100, workplace.folder / name / "lock"
        while f'"pid": {process.pid}' not in lock.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # stopped, it still holds the directory, which stays as it is
        assert f"is in use by process {process.pid} on host " in refused(name)
    finally:
        process.kill()
        process.wait()
    assert "--accept" in refused(name, DECAY)  # of the killed process nothing is left that keeps others out
