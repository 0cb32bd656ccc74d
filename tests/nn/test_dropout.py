"""Dropout: its rate, its scale, and what its bits depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GPT, make_setup

from mtx.nn.context import Dropout, drop

RATE = 0.25
ROWS, LENGTH, WIDTH = 4, 16, 64


@pytest.fixture(scope="module")
def comm():
    return make_setup(GPT).context.comm


def make_dropout(seed=0, rows=range(ROWS)):
    return Dropout(jax.random.key(seed), jnp.array(rows, jnp.int32), RATE)


def dropped(comm, dropout, rows=ROWS, length=LENGTH):
    return np.asarray(dropout(jnp.ones((rows, length, WIDTH)), comm))


def test_drops_at_its_rate_and_keeps_the_mean(comm):
    y = dropped(comm, make_dropout())
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - RATE))}
    deviation = (RATE * (1 - RATE) / y.size) ** 0.5
    assert abs((y == 0).mean() - RATE) < 4 * deviation
    # Each token of each row has bits of its own.
    assert len({token.tobytes() for token in y.reshape(-1, WIDTH)}) == ROWS * LENGTH


def test_bits_depend_on_key_site_row_and_place_alone(comm):
    y = dropped(comm, make_dropout())
    assert (y == dropped(comm, make_dropout())).all()
    assert (y != dropped(comm, make_dropout(seed=1))).any()
    assert (y != dropped(comm, make_dropout().at(0))).any()
    assert (dropped(comm, make_dropout().at(0)) != dropped(comm, make_dropout().at(1))).any()
    # Some of the rows, in another order, and the beginning of the sequence: as on another layout.
    assert (dropped(comm, make_dropout(rows=[3, 1]), rows=2, length=5) == y[[3, 1], :5]).all()


def test_keeps_the_dtype_and_may_be_absent(comm):
    x = jnp.ones((ROWS, LENGTH, WIDTH), jnp.bfloat16)
    assert make_dropout()(x, comm).dtype == jnp.bfloat16
    assert drop(None, 0, x, comm) is x
