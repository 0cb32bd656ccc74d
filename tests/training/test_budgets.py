"""What training steps cost stays what it was; UPDATE_GOLDEN=1 takes the new figures (see `budgets`)."""

import json

import budgets
import programs
import pytest
from training.counted_steps import CASES

GUARDED = ("dense", "scanned, 4 layers", "tensor 2, data 2", "pipe 2", "experts 2")

# Programs must not depend on the processor: neither on its widest vectors nor on its number of cores.
FLAGS = "--xla_cpu_max_isa=AVX2"


@pytest.fixture(scope="module")
def figures():
    """Of all cases, compiled in one process."""
    env = programs.environment(4, PJRT_NPROC="10")
    env["XLA_FLAGS"] += f" {FLAGS}"
    done = programs.run([str(programs.ROOT / "tests/training/counted_steps.py"), *CASES], env=env, timeout_s=400)
    return json.loads(done.stdout.splitlines()[-1])["figures"]


@pytest.mark.parametrize("name", GUARDED)
def test_steps_cost_what_they_did(figures, name):
    budgets.check(name, figures[name])


def test_a_step_multiplies_what_its_model_needs(figures):
    """Nothing is multiplied twice: neither by one device nor by the two that share it."""
    for name in ("dense", "tensor 2, data 2", "experts 2"):
        assert figures[name]["forward passes that the products make"] == pytest.approx(3, abs=0.01)


def test_programs_do_not_grow_with_their_layers(figures):
    few, many = figures["scanned, 4 layers"], figures["scanned, 16 layers"]
    assert few["equations"] == many["equations"]
    assert few["instructions of the program"] == pytest.approx(many["instructions of the program"], rel=0.01)
    assert many["count of products"] > 3 * few["count of products"]  # a loop's body is counted at every turn


def test_a_loss_that_keeps_all_logits_is_caught(figures):
    moved = budgets.compare(figures["dense"], figures["dense, whole logits"])
    assert any(line.startswith("bytes between: ") and line.endswith("has grown") for line in moved)


def test_what_has_moved_is_told():
    golden = {"count of all-gather over data": 14, "bytes between": 1000, "count of products": 8}
    found = {"count of all-gather over data": 15, "bytes between": 1029, "count of all-reduce over data": 2}
    assert budgets.compare(golden, golden) == []
    assert budgets.compare(golden, found) == [
        "count of all-gather over data: 14 -> 15 (+7.1%) has grown",
        "count of all-reduce over data: 0 -> 2 has grown",
        "count of products: 8 -> 0 (-100.0%) has shrunk; keep the gain with UPDATE_GOLDEN=1",
    ]
    (line,) = budgets.compare(golden, {**golden, "bytes between": 969})
    assert line == "bytes between: 1,000 -> 969 (-3.1%) has shrunk; keep the gain with UPDATE_GOLDEN=1"
