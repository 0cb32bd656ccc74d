"""Moments of the optimizer in the memory of the host: the same numbers, and checkpoints that open either way."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import LLAMA, make_setup, make_tokens

from mtx.checkpoints.store import Checkpoints
from mtx.errors import UserError
from mtx.mesh import host_memory
from mtx.optim.adafactor import Adafactor
from mtx.optim.adamw import AdamW
from mtx.optim.muon import Muon
from mtx.training.step import make_train_step

# Without biases: a key's has no gradient but rounding noise, which Adam divides by itself. A larger eps is for the same
# of single weights, whose gradient is small among those that it is the sum of.
MODEL = {**LLAMA, "num_layers": 1}
ADAM = AdamW(eps=1e-5)


def on_host(state):
    """Names of the leaves that live on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert {leaf.sharding.memory_kind for _, leaf in leaves} <= {"device", "pinned_host"}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if leaf.sharding.memory_kind == "pinned_host"
    }


def addresses(state):
    """Where in memory the moments are."""
    moments = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim]
    return [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in moments]


def train(step, state, numbers):
    """The state and the loss after the steps with these numbers."""
    for number in numbers:
        state, metrics = step(state, {"tokens": make_tokens(number), "learning_rate": np.float32(1e-2)})
    return state, float(metrics["loss"])


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def assert_close(one, other):
    """But for roundings: products and sums are fused otherwise."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)


def test_offloaded_run_is_the_same_and_its_checkpoints_open_either_way(tmp_path):
    here, there = (make_setup(MODEL, train={"offload_optimizer": it, "optimizer": ADAM}) for it in (False, True))
    step_here, step_there = make_train_step(here), make_train_step(there)
    moments = on_host(there.abstract_state)
    assert {name.split("/")[2] for name in moments} == {"mu", "nu"}  # and no counter, which the step reads at once
    assert len(moments) == 2 * len(jax.tree.leaves(there.abstract_state["params"]))
    expected, expected_loss = train(step_here, here.initialize(), [0, 1, 2, 3])
    assert on_host(expected) == set()

    begun = there.initialize()
    assert on_host(begun) == moments
    half, _ = train(step_there, begun, [0, 1])
    assert on_host(half) == moments
    middle = jax.tree.map(lambda leaf: np.array(leaf.copy()), half)

    with Checkpoints(tmp_path) as checkpoints:
        places = addresses(half)
        checkpoints.save(2, half, {})
        # While that is being written, the next step puts its moments where those of this one are.
        after, _ = train(step_there, half, [2])
        assert addresses(after) == places
        checkpoints.wait()
        again = checkpoints.restore(2, there.abstract_state)
        assert on_host(again) == moments
        assert_equal(again, middle)
        loaded = checkpoints.restore(2, here.abstract_state)
        assert on_host(loaded) == set()
        assert_equal(loaded, middle)
        checkpoints.save(3, loaded, {})
        offloaded = checkpoints.restore(3, there.abstract_state)
        assert on_host(offloaded) == moments
    for step, state in ((step_there, again), (step_here, loaded), (step_there, offloaded)):
        after, loss = train(step, state, [2, 3])
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_close(after, expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Adafactor(), Muon()])
def test_every_optimizer_can_be_offloaded(optimizer):
    here, there = (
        make_setup(MODEL, train={"offload_optimizer": offload, "optimizer": optimizer}) for offload in (False, True)
    )
    expected, _ = train(make_train_step(here), here.initialize(), [0, 1])
    state, _ = train(make_train_step(there), there.initialize(), [0, 1])
    assert on_host(state) == on_host(there.abstract_state) != set()
    assert_close(state, expected)


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
