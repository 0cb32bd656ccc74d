"""Moments of the optimizer in the memory of the host: the same numbers, and checkpoints that open either way."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import GPT, make_setup, make_tokens

from mtx.checkpoints.store import Checkpoints
from mtx.errors import UserError
from mtx.mesh import host_memory
from mtx.optim.adafactor import Adafactor
from mtx.optim.muon import Muon
from mtx.training.step import make_train_step

MODEL = {**GPT, "num_layers": 1}


def on_host(state):
    """Names of the leaves that live on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert {leaf.sharding.memory_kind for _, leaf in leaves} <= {"device", "pinned_host"}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if leaf.sharding.memory_kind == "pinned_host"
    }


def train(setup, state, steps, first=0):
    """The state and the loss after some steps."""
    step = make_train_step(setup)
    for i in range(first, first + steps):
        state, metrics = step(state, {"tokens": make_tokens(i), "learning_rate": np.float32(1e-2)})
    return state, float(metrics["loss"])


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def test_offloaded_run_is_bit_equal_and_its_checkpoints_open_either_way(tmp_path):
    here, there = (make_setup(MODEL, train={"offload_optimizer": offload}) for offload in (False, True))
    moments = on_host(there.abstract_state)
    assert {name.split("/")[2] for name in moments} == {"mu", "nu"}  # and no counter, which the step reads at once
    assert len(moments) == 2 * len(jax.tree.leaves(there.abstract_state["params"]))
    expected, expected_loss = train(here, here.initialize(), 4)
    assert on_host(expected) == set()

    begun = there.initialize()
    assert on_host(begun) == moments
    half, _ = train(there, begun, 2)
    assert on_host(half) == moments
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begun))  # memory of the host is used again as well

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        again = checkpoints.restore(2, there.abstract_state)
        assert on_host(again) == moments
        assert_equal(again, half)
        loaded = checkpoints.restore(2, here.abstract_state)
        assert on_host(loaded) == set()
        checkpoints.save(3, loaded, {})
        checkpoints.wait()
        offloaded = checkpoints.restore(3, there.abstract_state)
        assert on_host(offloaded) == moments
    for setup, state in ((there, again), (here, loaded), (there, offloaded)):
        after, loss = train(setup, state, 2, first=2)
        assert loss == expected_loss
        assert_equal(after, expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Adafactor(), Muon()])
def test_every_optimizer_can_be_offloaded(optimizer):
    here, there = (
        make_setup(MODEL, train={"offload_optimizer": offload, "optimizer": optimizer}) for offload in (False, True)
    )
    expected, _ = train(here, here.initialize(), 2)
    state, _ = train(there, there.initialize(), 2)
    assert on_host(state) == on_host(there.abstract_state) != set()
    assert_equal(state, expected)


def test_devices_without_memory_on_the_host_are_refused():
    class Memory:
        kind = "device"

    class Device:
        def addressable_memories(self):
            return [Memory()]

        def __str__(self):
            return "device 7"

    class FakeMesh:
        local_devices = (Device(),)

    with pytest.raises(UserError, match=r"pinned_host.*device 7 has device: set Train\.offload_optimizer = False"):
        host_memory(FakeMesh())
