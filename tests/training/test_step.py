"""The step against optimizers written by hand, and batches that grow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import reference_loss
from tiny import GPT, SEQ_LEN, Samples, make_setup, make_tokens

from mtx.config import schema
from mtx.data.ramp import BatchSizes
from mtx.optim.adamw import AdamW
from mtx.optim.warmup_cosine import WarmupCosine
from mtx.training.inputs import make_train_batch
from mtx.training.step import make_train_step

MODEL = {**GPT, "num_layers": 1}


def test_three_steps_equal_adamw_by_hand():
    beta1, beta2, decay, clip = 0.8, 0.9, 0.3, 0.5
    # Not tiny: where a gradient is rounding noise alone, Adam divides it by itself.
    eps = 1e-3
    optimizer = AdamW(beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, clip_norm=clip)
    setup = make_setup(MODEL, train={"optimizer": optimizer})
    step = make_train_step(setup)
    state = setup.initialize()
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), state["params"])
    mean = variance = jax.tree.map(np.zeros_like, params)
    decays = jax.tree.map(
        lambda axes: len(axes) - ("layers" in axes) >= 2, setup.definition.whole.axes, is_leaf=is_axes
    )
    differentiate = jax.jit(jax.value_and_grad(lambda p, t, w: reference_loss(setup.run.model, p, t, w)))
    ones = np.ones((8, SEQ_LEN), np.float32)
    for number in (1, 2, 3):
        tokens, rate = make_tokens(seed=number), 0.01 * number
        given = state
        state, metrics = step(state, {"tokens": tokens, "learning_rate": np.float32(rate)})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))

        loss, g = differentiate(jax.tree.map(jnp.float32, params), tokens, ones)
        g = jax.tree.map(lambda a: np.asarray(a, np.float64), g)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        assert norm > clip  # or the clipping is not tested
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        g = jax.tree.map(lambda a, norm=norm: a * clip / norm, g)
        mean = jax.tree.map(lambda m, a: beta1 * m + (1 - beta1) * a, mean, g)
        variance = jax.tree.map(lambda v, a: beta2 * v + (1 - beta2) * a**2, variance, g)

        def update(p, m, v, is_decayed, number=number, rate=rate):
            direction = (m / (1 - beta1**number)) / (np.sqrt(v / (1 - beta2**number)) + eps)
            return p - rate * (direction + decay * p * is_decayed)

        params = jax.tree.map(update, params, mean, variance, decays)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
            expected = params
            for key in path:
                expected = expected[key.key]
            # 3e-5 of the way that a parameter has gone: gradients agree to 1e-6 of the largest.
            np.testing.assert_allclose(leaf, expected, atol=3e-6, err_msg=jax.tree_util.keystr(path))
    assert int(state["step"]) == 3


def is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def test_ramped_run_equals_runs_of_its_sizes():
    """A batch that grows from 2 to 6, against separate programs of each size, from the same states."""
    ramp = schema.BatchRamp(start=2, increment=2, tokens=SEQ_LEN * 6)
    schedule = WarmupCosine(peak=0.01, final=0.001, warmup_tokens=SEQ_LEN * 8, decay_tokens=SEQ_LEN * 40)
    train = {"microbatch_size": 2, "optimizer": AdamW(learning_rate=schedule), "tokens": SEQ_LEN * 40, "steps": None}
    ramped = make_setup(MODEL, train={**train, "global_batch_size": 6, "batch_ramp": ramp})
    sizes = BatchSizes(global_batch_size=6, seq_len=SEQ_LEN, ramp=ramp)
    assert [sizes.size(i) for i in range(5)] == [2, 2, 4, 6, 6]
    step = make_train_step(ramped)
    fixed = {n: make_train_step(make_setup(MODEL, train={**train, "global_batch_size": n})) for n in (2, 4, 6)}
    state = ramped.initialize()
    for i in range(5):
        batch = make_train_batch(ramped, Samples(sizes), sizes, i)
        assert batch["learning_rate"] == np.float32(schedule.value(ramped.run, i + 1, sizes.tokens(i + 1)))
        tokens = Samples(sizes).read(i, range(sizes.size(i)))["tokens"]
        alone, expected = fixed[len(tokens)](
            jax.tree.map(jnp.copy, state), {"tokens": tokens, "learning_rate": batch["learning_rate"]}
        )
        state, metrics = step(state, batch)
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), (i, name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, alone)
    assert step._cache_size() == 1


def test_rows_of_a_ramped_batch_are_spread_over_the_shards():
    """Each shard's rows are filled from the front, each sample once; the rest has weight zero."""
    ramp = schema.BatchRamp(start=8, increment=8, tokens=SEQ_LEN * 100)
    setup = make_setup(
        MODEL, mesh={"data": 4}, train={"global_batch_size": 16, "batch_ramp": ramp, "microbatch_size": 1}
    )
    sizes = BatchSizes(global_batch_size=16, seq_len=SEQ_LEN, ramp=ramp)
    batch = make_train_batch(setup, Samples(sizes), sizes, 0)
    assert batch["num_microbatches"] == 2
    tokens = np.asarray(batch["tokens"]).reshape(4, 4, -1)
    np.testing.assert_array_equal(tokens[:, :2].reshape(8, -1), Samples(sizes).read(0, range(8))["tokens"])
    weights = np.asarray(batch["weights"]).reshape(4, 4, -1)
    assert (weights[:, :2] == 1).all()
    assert (weights[:, 2:] == 0).all()
    assert {shard.data.shape[0] for shard in batch["tokens"].addressable_shards} == {4}


@pytest.mark.parametrize("train", [{}, {"offload_optimizer": True}])
def test_update_with_infinite_gradient_is_skipped(train):
    experts = {**GPT, "num_layers": 1, "num_experts": 4, "experts_per_token": 2, "expert_bias_rate": 0.1}
    setup = make_setup(experts, train=train)
    step = make_train_step(setup)
    batch = {"tokens": make_tokens(), "learning_rate": np.float32(0.01)}
    state, metrics = step(setup.initialize(), batch)
    assert not metrics["skipped"]
    params = state["params"]
    state["params"] = {**params, "final_norm": jax.tree.map(lambda a: a * jnp.inf, params["final_norm"])}
    before = jax.tree.map(np.asarray, state)
    after, metrics = step(state, batch)
    assert metrics["skipped"]
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    jax.tree.map(np.testing.assert_array_equal, after, before)
