"""Whole runs from the command line: however they are interrupted and wherever they go on, the numbers are the same."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from programs import ROOT, run_processes

GOLDEN = ROOT / "tests/golden/losses.json"
KEYS = {
    "step", "tokens", "loss", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second",
    "model_tflops_per_device", "mfu", "data_wait_seconds",
}  # fmt: skip


def assert_same_arrays(workplace, one, other):
    """Every parameter and moment after the last step, bit by bit."""
    first, second = workplace.state(one, 20), workplace.state(other, 20)
    assert first.keys() == second.keys()
    assert sum("'optimizer'" in name for name in first) > 2 * sum("'params'" in name for name in first)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def test_metrics_of_a_run(workplace, straight):
    records = workplace.records(straight)
    steps = [record for record in records if "eval" not in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert all(record.keys() == KEYS for record in steps)
    assert [record["tokens"] for record in steps] == [256 * step for step in range(1, 21)]
    assert steps[3]["learning_rate"] == pytest.approx(1e-2)
    assert steps[0]["mfu"] is None  # nobody knows the peak of this CPU
    # Batches are ready before the step: reading takes no time of it (the median, since the machine has other work).
    assert sorted(record["data_wait_seconds"] for record in steps)[10] < 0.005
    (evaluation,) = (record for record in records if "eval" in record)
    assert (evaluation["eval"], evaluation["step"], evaluation["tokens"]) == ("later chapters", 20, 3 * 256)
    assert evaluation["loss"] < steps[0]["loss"] - 0.5
    assert {path.name for path in (workplace.folder / straight).iterdir()} >= {
        "config.gin", "metrics.jsonl", "journal.jsonl", "checkpoints", "tensorboard", "tokenizer", "report.html",
    }  # fmt: skip


def test_golden_losses(workplace, straight):
    losses = [loss for _, name, loss in workplace.losses(straight) if name is None]
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=0) + "\n")
    # CPUs sum in vectors of different lengths: 1e-7 at the first step, which twenty steps of Adam make larger.
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=1e-4)


def test_resumed_run_is_bit_equal(workplace, straight):
    workplace.train("resumed", "Train.steps = 6")
    assert [step for step, name, _ in workplace.losses("resumed") if name is None] == [1, 2, 3, 4, 5, 6]
    workplace.train("resumed")
    lines = [line for line in workplace.losses("resumed") if line[:2] != (6, "later chapters")]
    assert lines == workplace.losses(straight)
    assert (workplace.folder / "resumed/config.until-6.gin").exists()
    assert_same_arrays(workplace, "resumed", straight)


@pytest.mark.slow
def test_interrupted_run_is_bit_equal(workplace, straight):
    name = "interrupted"
    assert workplace.interrupt(name, 3, signal.SIGTERM) == 4
    stopped = max(step for step, _, _ in workplace.losses(name))
    assert stopped < 20
    events = [json.loads(line) for line in (workplace.folder / name / "journal.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["step"]) == ("preempted", stopped)
    assert str(stopped) in os.listdir(workplace.folder / name / "checkpoints")  # nothing that was done is lost

    assert workplace.interrupt(name, stopped + 5, signal.SIGKILL) == -signal.SIGKILL
    assert max(step for step, _, _ in workplace.losses(name)) < 20
    workplace.train(name)
    lines = [line for line in workplace.losses(name) if line[1] is None or line[0] == 20]
    assert lines == workplace.losses(straight)
    assert_same_arrays(workplace, name, straight)


def assert_close(workplace, name, straight):
    """The same losses but for the order of float32 sums."""
    moved = [loss for _, validation, loss in workplace.losses(name) if validation is None]
    expected = [loss for _, validation, loss in workplace.losses(straight) if validation is None]
    assert moved[0] == pytest.approx(expected[0], rel=1e-6)
    # Adam divides a gradient that is rounding noise by itself: from the second step on parameters differ a little.
    np.testing.assert_allclose(moved, expected, rtol=3e-5)


@pytest.mark.slow
def test_run_goes_on_with_other_meshes(workplace, straight):
    """Eight devices in two layouts, then one."""
    name = "moved"
    workplace.train(name, "Train.steps = 4", "Mesh.data = 2", "Mesh.fsdp = 2", "Mesh.tensor = 2", devices=8)
    workplace.train(name, "Train.steps = 8", "Mesh.data = 8", devices=8)
    workplace.train(name)
    assert_close(workplace, name, straight)


@pytest.mark.slow
def test_two_processes_equal_one(workplace, straight):
    """Over gloo, with a device each: each reads its half of every batch."""
    run_processes(workplace.command("two"), count=2, env=workplace.environment())
    assert_close(workplace, "two", straight)
    assert [step for step, name, _ in workplace.losses("two") if name] == [20]
    workplace.state("two", 20)  # what two processes saved, one restores


@pytest.mark.slow
def test_pipeline_over_two_processes_goes_on_anywhere(workplace, straight):
    """A stage in each process, two devices each; then one process with one device; then stages again, by tensor."""
    name = "piped"
    pipe = ["Mesh.pipe = 2", "Train.microbatch_size = 2"]
    settings = ["Train.steps = 6", *pipe, "Mesh.data = 2", "Train.offload_optimizer = True"]
    run_processes(workplace.command(name, *settings, devices=2), count=2, env=workplace.environment(2))
    assert [step for step, validation, _ in workplace.losses(name) if validation] == [6]
    workplace.train(name, "Train.steps = 12")
    settings = [*pipe, "Mesh.tensor = 2", "Pipeline.head = 'last'"]
    run_processes(workplace.command(name, *settings, devices=2), count=2, env=workplace.environment(2))
    assert_close(workplace, name, straight)
    (measured,), (expected,) = (
        [loss for step, validation, loss in workplace.losses(run) if validation and step == 20]
        for run in (name, straight)
    )
    assert measured == pytest.approx(expected, rel=3e-5)
