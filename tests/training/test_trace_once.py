"""Layers in line are traced once for all of them, under every recompute policy: the time does not grow with them."""

import jax
import numpy as np
import pytest
from tiny import GPT, make_run

from mtx.mesh import make_mesh
from mtx.models.decoder import Layer
from mtx.training.state import Setup
from mtx.training.step import make_train_step


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_in_line_are_traced_once(recompute, monkeypatch):
    calls, right = [], Layer.__call__

    def count(layer, *args, **kwargs):
        calls.append(layer)
        return right(layer, *args, **kwargs)

    monkeypatch.setattr(Layer, "__call__", count)
    run = make_run({**GPT, "num_layers": 5}, train={"recompute": recompute})
    setup = Setup(run, make_mesh(run.mesh, jax.devices()[:1]))
    batch = {
        "tokens": jax.ShapeDtypeStruct((run.train.global_batch_size, run.train.seq_len + 1), np.int32),
        "learning_rate": jax.ShapeDtypeStruct((), np.float32),
    }
    make_train_step(setup).trace(setup.abstract_state, batch)
    assert not setup.scans_layers
    assert len(calls) == 1
