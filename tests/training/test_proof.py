"""The proof of a resume: what passes, what stops the run, and what it says then."""

from __future__ import annotations

import math

import numpy as np
import pytest
from programs import run_json

from mtx.errors import CheckpointError, UserError
from mtx.training.proof import (
    BLOCK_ROWS,
    TOLERANCES,
    Tolerance,
    batch_digest,
    is_deterministic,
    program_differences,
    prove_arrays,
    prove_batch,
    prove_step,
    tolerance_of,
)

SAVED = {"params/a": "00", "params/b": "11", "step": "22"}
PROBE = {"loss": 3.25, "grad_norm": 0.5}
OTHER = ["mesh {'data': 2} -> {'data': 4}"]
TOLERANCE = Tolerance(loss=1e-5, grad_norm=1e-4)


class Rows:
    """Reads the rows of arrays that are in memory, as every step."""

    def __init__(self, **arrays):
        self.arrays, self.largest = arrays, 0

    def read(self, step, rows):
        self.largest = max(self.largest, len(rows))
        return {name: values[rows] + step for name, values in self.arrays.items()}


def make_rows(num_rows=2 * BLOCK_ROWS + 3):
    tokens = np.random.default_rng(0).integers(0, 99, (num_rows, 5)).astype(np.int32)
    return {"tokens": tokens, "segments": tokens // 50}


def test_a_batch_has_one_digest_however_it_is_read(monkeypatch):
    rows, num_rows = Rows(**make_rows()), 2 * BLOCK_ROWS + 3
    whole = batch_digest(rows, 4, num_rows)
    assert rows.largest == BLOCK_ROWS
    assert len(whole) == 16
    monkeypatch.setattr("mtx.training.proof.BLOCK_ROWS", 10**6)
    assert batch_digest(Rows(**dict(reversed(make_rows().items()))), 4, num_rows) == whole


def test_other_batches_have_other_digests():
    arrays, num_rows = make_rows(8), 8
    tokens, changed, swapped = arrays["tokens"], arrays["tokens"].copy(), arrays["tokens"].copy()
    changed[7, 4] += 1
    swapped[[0, 1]] = tokens[[1, 0]]
    found = {
        batch_digest(Rows(**arrays), 0, num_rows),
        batch_digest(Rows(**arrays), 1, num_rows),
        batch_digest(Rows(**arrays), 0, num_rows - 1),
        batch_digest(Rows(tokens=tokens), 0, num_rows),
        batch_digest(Rows(tokens=arrays["segments"], segments=tokens), 0, num_rows),
        *(batch_digest(Rows(**{**arrays, "tokens": other}), 0, num_rows) for other in (changed, swapped)),
        batch_digest(Rows(**{**arrays, "tokens": tokens.astype(np.uint32)}), 0, num_rows),
    }
    assert len(found) == 8


def test_equal_arrays_are_proven():
    assert prove_arrays(SAVED, dict(SAVED), step=20) == "equal"


@pytest.mark.parametrize(
    ("restored", "told"),
    [
        ({**SAVED, "params/b": "12"}, "params/b differs from what was saved: digest 12, saved 11"),
        ({"params/a": "00", "step": "22"}, "params/b differs from what was saved: digest none, saved 11"),
        ({**SAVED, "params/c": "33"}, "params/c differs from what was saved: digest 33, saved none"),
    ],
)
def test_the_array_that_differs_is_named(restored, told):
    with pytest.raises(CheckpointError) as caught:
        prove_arrays(SAVED, restored, step=20)
    assert "checkpoint 20: 1 of 3 arrays\n" in str(caught.value)
    assert told in str(caught.value)
    assert "params/a differs" not in str(caught.value)


def test_of_many_arrays_the_first_are_named():
    saved = {f"params/{number}": "00" for number in range(9)}
    with pytest.raises(CheckpointError, match="9 of 9 arrays") as caught:
        prove_arrays(saved, dict.fromkeys(saved, "01"), step=20)
    assert str(caught.value).count("differs from what was saved") == 5
    assert "and 4 more" in str(caught.value)


def test_a_batch_that_differs_stops_the_run_unless_accepted():
    assert prove_batch("ab", "ab", step=20) == prove_batch("ab", "ab", step=20, reason="Data.train accepted") == "equal"
    assert prove_batch("ab", "cd", step=20, reason="Data.train accepted") == "changed (Data.train accepted)"
    with pytest.raises(UserError, match="step 21 would train on another batch") as caught:
        prove_batch("ab", "cd", step=20)
    assert caught.value.exit_code == 2
    assert "digest cd, then ab" in str(caught.value)


def prove(now, differences=(), reason=None):
    return prove_step(PROBE, {**PROBE, **now}, step=20, differences=differences, tolerance=TOLERANCE, reason=reason)


def test_the_same_program_must_give_the_same_bits():
    assert prove({}) == prove({}, OTHER) == "bit-equal"
    for name, value in PROBE.items():
        with pytest.raises(UserError, match="step 21 does not repeat") as caught:
            prove({name: math.nextafter(value, math.inf)})
        assert f"{name} {math.nextafter(value, math.inf)!r}, saved {value!r}" in str(caught.value)
        assert "The program is the same" in str(caught.value)


def test_another_program_must_stay_within_the_tolerance():
    assert prove({"loss": 3.25 * (1 + 3e-7)}, OTHER) == "within 3e-07 of 1e-05"
    assert prove({"loss": 3.25 * (1 + 3e-7), "grad_norm": 0.5 * (1 - 9e-5)}, OTHER) == "within 9e-05 of 1e-04"
    for now, named in (({"loss": 3.25 * (1 + 2e-5)}, "loss"), ({"grad_norm": 0.5 * (1 - 2e-4)}, "grad_norm")):
        with pytest.raises(UserError) as caught:
            prove(now, OTHER)
        assert f": {named} " in str(caught.value)
        assert OTHER[0] in str(caught.value)


@pytest.mark.parametrize("differences", [(), OTHER])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_is_no_number_is_equal_to_itself_alone(value, differences):
    probe = {"loss": value, "grad_norm": 0.5}
    options = {"step": 20, "differences": differences, "tolerance": TOLERANCE}
    assert prove_step(probe, dict(probe), **options) == "bit-equal"
    for saved, now in ((probe, PROBE), (PROBE, probe)):
        with pytest.raises(UserError, match="does not repeat"):
            prove_step(saved, now, **options)


def test_nothing_follows_from_what_was_accepted():
    assert prove({"loss": 9.0}, [], "Precision.compute accepted") == "not comparable: Precision.compute accepted"


def test_what_makes_it_another_program():
    meta = {
        "program": "1f", "mesh": {"data": 2}, "processes": 1, "device_kind": "cpu", "cores": 2,
        "xla_flags": "", "versions": {"jax": "1"}, "tokens": 7,
    }  # fmt: skip
    assert program_differences(meta, {**meta, "tokens": 9}) == []
    others = {"program": "2e", "mesh": {"data": 4}, "processes": 2, "device_kind": "H200", "xla_flags": "-", "cores": 4}
    for key, value in others.items():
        assert program_differences(meta, {**meta, key: value}) == [f"{key} {meta[key]} -> {value}"]


def test_only_some_programs_repeat_their_bits():
    assert is_deterministic("cpu", "")
    assert not is_deterministic("gpu", "--xla_gpu_deterministic_ops=false --xla_gpu_autotune_level=0")
    assert is_deterministic("gpu", "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true")


def test_float32_of_gpus_is_held_to_what_they_make_of_it():
    assert tolerance_of("float32", ["cpu", "cpu"]) == TOLERANCES["float32"]
    assert tolerance_of("float32", ["cpu", "NVIDIA H200"]) == TOLERANCES["bfloat16"]
    assert tolerance_of("bfloat16", ["cpu"]) == TOLERANCES["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_tolerances_are_some_times_what_occurs(compute):
    results = run_json("training/digests.py", "noise", compute, devices=8, timeout_s=580)
    worst = np.max(list(results.values()), axis=0)
    allowed = np.array([TOLERANCES[compute].loss, TOLERANCES[compute].grad_norm])
    assert (worst > 0).all()
    assert (worst < allowed / 3).all(), results
