"""What a run compiles and waits for stays what it was; UPDATE_GOLDEN=1 takes the new figures (see `budgets`)."""

import json
from collections import Counter

import budgets
import pytest
from programs import ROOT, run

STEPS, EVERY = 12, 4
"""Steps of a run, and after how many it is evaluated and saved."""

SETTINGS = (f"Train.steps = {STEPS}", f"Train.eval_every = {EVERY}", f"Checkpoint.every_steps = {EVERY}")


def count(workplace, name, *options):
    arguments = workplace.command(name, *SETTINGS)[2:]
    done = run([str(ROOT / "tests/commands/counted_run.py"), *options, *arguments], env=workplace.environment())
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counts(workplace):
    return count(workplace, "counted")


def late_compiles(counts):
    """Programs that are made after the first evaluation and checkpoint."""
    return sum(dispatched > EVERY for dispatched in counts["compiled"])


def own_waits(counts):
    """Steps that are waited for before the next one was dispatched, though nothing is due after them. (The step after
    the last one, which only proves the checkpoint, is waited for.)"""
    return {step for step, dispatched in counts["waits"] if step == dispatched and step <= STEPS and step % EVERY}


def plain_waits(counts):
    """Values that are waited for or copied while a step is the last one dispatched after which nothing is due."""
    copies = Counter(counts["copied"])
    return {step: copies[step] for step in range(2, STEPS) if step % EVERY and (step - 1) % EVERY}


def test_a_run_compiles_and_waits_as_it_did(counts):
    plain = plain_waits(counts)
    assert len(set(plain.values())) == 1, plain
    metrics = Counter(step for step, _ in counts["waits"])
    assert len({metrics[step] for step in range(1, STEPS + 1)}) == 1  # each is read as often as any other
    figures = {
        "programs compiled": len(counts["compiled"]),
        "programs compiled after the first evaluation and checkpoint": late_compiles(counts),
        "values of a step waited for": metrics[2],
        "values copied to the host in a step after which nothing is due": plain[2],
    }
    budgets.check("run", figures)


def test_no_step_is_waited_for_while_the_device_has_nothing_to_do(counts):
    assert own_waits(counts) == set()
    assert late_compiles(counts) == 0


def test_a_loop_that_waits_and_compiles_is_caught(workplace):
    spoiled = count(workplace, "spoiled", "--spoiled")
    assert own_waits(spoiled) == {step for step in range(1, STEPS) if step % EVERY}
    assert late_compiles(spoiled) >= STEPS - EVERY - 1
