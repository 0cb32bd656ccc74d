"""The decoder against an independent one, on one device: loss, gradients, causality, documents, ways to compute it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from reference import reference_loss
from tiny import ALIBI, GPT, LLAMA, SEQ_LEN, Program, make_params, make_program, make_setup, make_tokens, worst_error

from mtx.training.forward import Forward
from mtx.training.step import make_loss_and_gradients

MODELS: dict[str, dict[str, Any]] = {"gpt": GPT, "llama": LLAMA, "alibi": ALIBI}
ENDS = (6, 11, SEQ_LEN + 1)
"""Where the documents of a packed row end."""
# float32 sums of at most 128 terms in another order, through three layers: a share of a leaf's largest value.
TOLERANCE = 1e-5


@cache
def program(name: str) -> Program:
    return make_program(make_setup(MODELS[name]))


@cache
def reference(name: str, **changes: Any) -> Callable[..., tuple[jax.Array, Any]]:
    config = make_setup({**MODELS[name], **changes}).run.model
    return jax.jit(jax.value_and_grad(lambda params, tokens, weights: reference_loss(config, params, tokens, weights)))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_reference(name):
    params, tokens = make_params(make_setup(MODELS[name])), make_tokens()
    weights = np.random.default_rng(2).integers(0, 3, (len(tokens), SEQ_LEN)).astype(np.float32)  # a third are zero
    loss, grads = program(name)(params, {"tokens": tokens, "weights": weights})
    expected, expected_grads = reference(name)(jax.tree.map(jnp.asarray, params), tokens, weights)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    worst, error = worst_error(grads, expected_grads)
    assert error < TOLERANCE, worst


def packed_row() -> dict[str, np.ndarray]:
    tokens = make_tokens(batch=1)
    lengths = np.diff([0, *ENDS])
    segments = np.repeat(np.arange(1, len(ENDS) + 1), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_the_same_documents_alone(name):
    setup = make_setup({**MODELS[name], "num_layers": 1})
    params, row = make_params(setup), packed_row()
    loss, grads = make_program(setup)(params, row)
    expected, expected_grads, count = 0.0, jax.tree.map(np.zeros_like, params), SEQ_LEN + 1 - len(ENDS)
    for begin, end in zip((0, *ENDS), ENDS):
        tokens = row["tokens"][:, begin:end]
        one, one_grads = reference(name, num_layers=1)(params, tokens, np.ones((1, end - begin - 1), np.float32))
        share = (end - begin - 1) / count
        expected += share * float(one)
        expected_grads = jax.tree.map(lambda total, g, share=share: total + share * g, expected_grads, one_grads)
    assert loss == pytest.approx(expected, rel=1e-6)
    worst, error = worst_error(grads, expected_grads)
    assert error < TOLERANCE, worst


@pytest.mark.parametrize("name", MODELS)
def test_causal_by_gradient(name):
    """d (output at t) / d (embedding of the token at s) is exactly 0 for s > t, and for s in another document."""
    setup = make_setup({**MODELS[name], "vocab_size": 2 * SEQ_LEN})
    forward, row = Forward(setup), packed_row()
    inputs = {
        "tokens": np.arange(SEQ_LEN, dtype=np.int32)[None],  # each row of the table is the input of one place
        "segments": row["segments"][:, :-1],
        "positions": row["positions"][:, :-1],
    }
    direction_D = np.random.default_rng(1).standard_normal(GPT["d_model"])

    def body(params: Any, inputs: Any) -> jax.Array:
        prepared = forward.prepare(params)
        return forward.hidden(forward.bind(prepared), prepared, inputs)[0][0] @ direction_D

    def influence(params: Any, inputs: Any) -> jax.Array:
        def outputs(table_VD: jax.Array) -> jax.Array:
            whole = {**params, "embedding": {"table": table_VD}}
            return jax.shard_map(body, mesh=setup.mesh, in_specs=(P(), P()), out_specs=P())(whole, inputs)

        return jnp.abs(jax.jacrev(outputs)(params["embedding"]["table"])).max(-1)[:, :SEQ_LEN]

    influence_TS = np.asarray(jax.jit(influence)(make_params(setup), inputs))
    segments_T = inputs["segments"][0]
    allowed_TS = np.tri(SEQ_LEN, dtype=bool) & (segments_T[:, None] == segments_T)
    assert (influence_TS[~allowed_TS] == 0).all()
    assert (influence_TS[allowed_TS] > 1e-6).all()


DROPOUT: dict[str, Any] = {"dropout": 0.1}


@pytest.fixture(scope="module")
def plain():
    setup = make_setup(LLAMA, train=DROPOUT)
    return setup, make_program(setup)


@pytest.mark.parametrize(
    "train",
    [
        {"recompute": "selective", "loss_chunk_tokens": 5},
        {"recompute": "full", "microbatch_size": 2},
        {"recompute": "selective", "scan_layers": True, "microbatch_size": 4},
        {"scan_layers": True},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(plain, train):
    """Recomputation, scanned layers, chunks of the loss and microbatches; the dropout is the same as well."""
    setup, plain_program = plain
    other = make_setup(LLAMA, train={**DROPOUT, **train})
    params, batch = make_params(setup), {"tokens": make_tokens()}
    expected, expected_grads = plain_program(params, batch)
    loss, grads = make_program(other)(params, batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    worst, error = worst_error(grads, expected_grads)
    assert error < TOLERANCE, worst
    assert other.abstract_state == setup.abstract_state  # a checkpoint of the one is a checkpoint of the other


def lower(train: dict[str, Any], num_layers: int = 4) -> Any:
    setup = make_setup({**GPT, "num_layers": num_layers}, train=train)
    program = jax.jit(make_loss_and_gradients(setup))
    batch = {"tokens": make_tokens()}
    return program.lower(setup.abstract_state["params"], batch, jnp.float32(1), jax.random.key(0), None)


def test_recomputation_saves_memory():
    """Scanned; in line XLA's CPU compiler drops the barriers that keep what is computed again apart."""
    none, selective, full = (
        lower({"recompute": recompute, "scan_layers": True}, 8).compile().memory_analysis().temp_size_in_bytes
        for recompute in ("none", "selective", "full")
    )
    assert selective < 0.5 * none
    assert full < 0.6 * selective


def count_calls(lowered: Any, operation: str) -> int:
    """How often a program comes to an operation, functions that it calls several times counted each time."""
    parts = lowered.as_text().split("func.func ")[1:]
    bodies = {re.search(r"@(\w+)", part)[1]: part for part in parts}

    def count(name: str) -> int:
        body = bodies[name]
        return body.count(operation) + sum(map(count, re.findall(r"call @(\w+)", body)))

    return count("main")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_layers_in_line_have_a_barrier_each_against_merging(recompute):
    assert count_calls(lower({"recompute": recompute}), "optimization_barrier") >= 4
    assert "optimization_barrier" not in lower({"recompute": "none"}).as_text()
    assert "optimization_barrier" not in lower({"recompute": recompute, "scan_layers": True}).as_text()


def test_dropout_follows_its_key(plain):
    setup, compute = plain
    params, batch = make_params(setup), {"tokens": make_tokens()}
    assert compute(params, batch, seed=1)[0] == compute(params, batch, seed=1)[0]
    assert abs(compute(params, batch, seed=1)[0] - compute(params, batch, seed=2)[0]) > 1e-3


def test_bfloat16_is_near_float32_and_keeps_float32_weights():
    setup = make_setup(GPT, precision={"compute": "bfloat16"})
    params, batch = make_params(setup), {"tokens": make_tokens()}
    loss, grads = make_program(setup)(params, batch)  # asserts that gradients are float32
    expected, expected_grads = program("gpt")(params, batch)
    assert loss == pytest.approx(expected, abs=2e-2)
    assert loss != expected
    _, error = worst_error(grads, expected_grads)
    assert error < 0.1  # 8 bits of mantissa, through three layers
    assert {leaf.dtype for leaf in jax.tree.leaves(setup.abstract_state["params"])} == {jnp.dtype("float32")}
