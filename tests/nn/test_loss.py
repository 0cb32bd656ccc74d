"""Cross entropy in chunks: equal to the plain one, and never with all logits in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GPT, make_setup

from mtx.nn.loss import cross_entropy


@pytest.fixture(scope="module")
def comm():
    return make_setup(GPT).context.comm


def make_inputs(batch, length, vocab_size, width=8):
    rng = np.random.default_rng(3)
    x_BTD, w_VD = rng.standard_normal((batch, length, width)), rng.standard_normal((vocab_size, width))
    targets_BT = rng.integers(0, vocab_size, (batch, length)).astype(np.int32)
    weights_BT = rng.random((batch, length)) * rng.integers(0, 2, (batch, length))  # half of them are zero
    x_BTD, w_VD, weights_BT = (jnp.asarray(a, jnp.float32) for a in (x_BTD, w_VD, weights_BT))
    return x_BTD, w_VD, jnp.asarray(targets_BT), weights_BT


def plain(x_BTD, w_VD, targets_BT, weights_BT):
    log_p_BTV = jax.nn.log_softmax(x_BTD @ w_VD.T)
    return -(weights_BT * jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]).sum()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 21, 1000])
def test_equals_the_plain_one(comm, chunk_tokens):
    x, w, targets, weights = make_inputs(3, 7, 11)

    def chunked(x, w):
        return 2.0 * cross_entropy(comm, x, w, targets, weights, chunk_tokens)  # a cotangent that is not 1

    loss, (dx, dw) = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, w)
    expected, (dx0, dw0) = jax.value_and_grad(lambda x, w: 2.0 * plain(x, w, targets, weights), (0, 1))(x, w)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(jax.jit(chunked)(x, w)) == pytest.approx(float(expected), rel=1e-6)  # without gradient: another path
    np.testing.assert_allclose(dx, dx0, atol=2e-6)
    np.testing.assert_allclose(dw, dw0, atol=5e-6)
    assert (np.asarray(dx)[np.asarray(weights) == 0] == 0).all()


def test_large_logits_do_not_overflow(comm):
    x, w, targets, weights = make_inputs(2, 3, 5)
    loss, dx = jax.value_and_grad(lambda x: cross_entropy(comm, x, w, targets, weights, 2))(1e3 * x)
    assert float(loss) == pytest.approx(float(plain(1e3 * x, w, targets, weights)), rel=1e-6)
    assert np.isfinite(dx).all()


def test_not_all_logits_are_in_memory(comm):
    x, w, targets, weights = make_inputs(4, 512, 8192)
    whole = 4 * 4 * 512 * 8192

    def temporary_bytes(loss):
        return jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(lambda x, w: cross_entropy(comm, x, w, targets, weights, 64))
    assert chunked < whole / 8
    assert temporary_bytes(lambda x, w: plain(x, w, targets, weights)) >= whole  # or this measures nothing
