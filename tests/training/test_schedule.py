"""Schedules without devices: what the lists of tasks promise, and that the closed form says the same."""

from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

from mtx.config import schema
from mtx.training.schedule import SCHEDULES, Lockstep, Task, bubble_fraction, one_f_one_b

SHAPES = [
    (S, v, M) for S in range(1, 7) for v in range(1, 5) for M in ((1, 2, 3, 5, 7, 12) if v == 1 else (S, 2 * S, 3 * S))
]
shapes = pytest.mark.parametrize(("S", "v", "M"), SHAPES, ids=str)


def by_unit(tasks, kind, S):
    """(virtual stage, microbatch) -> tick."""
    return {(task.chunk * S + task.stage, task.microbatch): task.tick for task in tasks if task.kind == kind}


@shapes
def test_every_unit_is_done_once_in_the_order_of_the_network(S, v, M):
    V, tasks = S * v, one_f_one_b(S, v, M)
    forward, backward = by_unit(tasks, "forward", S), by_unit(tasks, "backward", S)
    units = {(q, m) for q in range(V) for m in range(M)}
    assert len(tasks) == 2 * len(units)
    assert set(forward) == set(backward) == units
    assert len({(task.tick, task.stage, task.kind) for task in tasks}) == len(tasks)  # a stage does one at a time
    for q, m in units - {(V - 1, m) for m in range(M)}:
        assert forward[q + 1, m] == forward[q, m] + 1  # so what is received needs no store
        assert backward[q, m] == backward[q + 1, m] + 1
        assert forward[q, m] < backward[q, m]
    assert all(forward[V - 1, m] == backward[V - 1, m] for m in range(M))
    assert [task.tick for task in tasks] == sorted(task.tick for task in tasks)


@shapes
def test_the_closed_form_is_the_schedule(S, v, M):
    tasks, lockstep = one_f_one_b(S, v, M), Lockstep(S, v, M)
    first_backward, last_forward, num_ticks = lockstep.ticks
    assert first_backward == min(task.tick for task in tasks if task.kind == "backward")
    assert last_forward == 1 + max(task.tick for task in tasks if task.kind == "forward")
    assert num_ticks == 1 + max(task.tick for task in tasks)
    found = {
        Task(tick, stage, kind, unit.chunk, unit.microbatch)
        for tick in range(-2, num_ticks + 2)
        for stage in range(S)
        for kind, unit in (("forward", lockstep.forward(tick, stage)), ("backward", lockstep.backward(tick, stage)))
        if unit.valid
    }
    assert found == set(tasks)


@shapes
def test_no_input_is_overwritten_before_it_is_used(S, v, M):
    """Played as a stage does it: at each tick first the forward unit writes, valid or not, then the backward reads."""
    lockstep = Lockstep(S, v, M)
    longest = 0
    for stage in range(S):
        ring: dict = {}
        for tick in range(lockstep.ticks[1]):
            unit = lockstep.forward(tick, stage)
            assert 0 <= unit.slot < lockstep.depth
            ring[unit.slot] = (unit.valid, unit.chunk, unit.microbatch, tick)
            longest = max(longest, _read(lockstep, tick, stage, ring))
        for tick in range(lockstep.ticks[1], lockstep.ticks[2]):
            longest = max(longest, _read(lockstep, tick, stage, ring))
    assert longest == lockstep.depth - 1  # with a slot less, the next input would fall on this one


def _read(lockstep, tick, stage, ring):
    """For how many ticks the input of this tick's backward unit was kept."""
    unit = lockstep.backward(tick, stage)
    if not unit.valid:
        return 0
    *written, since = ring[unit.slot]
    assert written == [True, unit.chunk, unit.microbatch]
    return tick - since


@shapes
def test_the_bubble_is_that_of_interleaved_1f1b(S, v, M):
    assert bubble_fraction(one_f_one_b(S, v, M)) == pytest.approx((S - 1) / (v * M))


def test_a_small_schedule_by_hand():
    at = {(task.tick, task.stage, task.kind): (task.chunk, task.microbatch) for task in one_f_one_b(2, 1, 3)}
    assert at == {
        (0, 0, "forward"): (0, 0),
        (1, 0, "forward"): (0, 1), (1, 1, "forward"): (0, 0), (1, 1, "backward"): (0, 0),
        (2, 0, "forward"): (0, 2), (2, 1, "forward"): (0, 1), (2, 1, "backward"): (0, 1), (2, 0, "backward"): (0, 0),
        (3, 1, "forward"): (0, 2), (3, 1, "backward"): (0, 2), (3, 0, "backward"): (0, 1),
        (4, 0, "backward"): (0, 2),
    }  # fmt: skip


def test_chunks_of_a_group_take_turns():
    order = [(task.chunk, task.microbatch) for task in one_f_one_b(2, 2, 4) if task[1:3] == (0, "forward")]
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_groups_must_be_full():
    with pytest.raises(ValueError, match="6 microbatches in groups of 4"):
        one_f_one_b(4, 2, 6)


@pytest.mark.parametrize("convert", [np.int32, jnp.int32])
def test_arrays_give_what_integers_give(convert):
    plain, traced = Lockstep(3, 2, 6), Lockstep(3, 2, convert(6))
    assert [int(tick) for tick in traced.ticks] == list(plain.ticks)
    ticks, stages = np.meshgrid(np.arange(-2, plain.ticks[2] + 2, dtype=np.int32), np.arange(3, dtype=np.int32))
    for name in ("forward", "backward"):
        units = [
            getattr(plain, name)(int(tick), int(stage))
            for tick, stage in zip(ticks.reshape(-1), stages.reshape(-1), strict=True)
        ]
        together = getattr(traced, name)(convert(ticks.reshape(-1)), convert(stages.reshape(-1)))
        for values, expected in zip(together, zip(*units, strict=True), strict=True):
            np.testing.assert_array_equal(np.asarray(values), expected)


def test_each_name_of_the_config_is_a_schedule():
    assert set(SCHEDULES) == set(get_args(get_type_hints(schema.Pipeline)["schedule"]))
