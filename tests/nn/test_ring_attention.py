"""Attention over a split sequence: equal to that over the whole one, balanced, exact in bytes, linear in memory."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from nn.context_attention import CASES, make_inputs, make_program
from programs import run_json
from tiny import GPT, make_setup
from training.context_layouts import MODELS

from mtx.errors import UserError
from mtx.nn import ring_attention
from mtx.nn.attention import choose_kernel
from mtx.nn.context import Context
from mtx.nn.ring_attention import own_pairs, remote_pairs
from mtx.planning.hlo_collectives import KINDS

FAST = ["ring 4, everything", "all_to_all 4, everything"]


def check_cases(names):
    for name, errors in run_json("nn/context_attention.py", *names, devices=8).items():
        # float32: sums of some dozens of terms in another order. bfloat16 has 8 digits: a unit in the last place of the
        # output, and of the weights and of the gradients of scores that sums are taken of.
        output, gradients = (8e-3, 1.6e-2) if "bfloat16" in name else (1e-6, 1e-5)
        assert errors[0] <= output, name
        assert max(errors[1:]) <= gradients, name


def test_split_attention_equals_whole():
    check_cases(FAST)


@pytest.mark.slow
def test_split_attention_equals_whole_in_every_case():
    check_cases([name for name in CASES if name not in FAST])


@pytest.mark.parametrize(
    "name", ["fast", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "fast")]
)
def test_models_equal_one_device(name):
    results = run_json("training/context_layouts.py", name, devices=8)
    assert list(results) == MODELS[name][3]
    for layout, (loss_error, worst, gradient_error) in results.items():
        assert loss_error <= 1e-6, layout
        assert gradient_error <= 1e-5, (layout, worst)


@pytest.mark.parametrize(("shards", "blocks"), [(2, 1), (2, 3), (4, 2), (8, 1)])
def test_every_visible_pair_of_blocks_is_visited_once_and_no_other(shards, blocks):
    """By the places in the row of blocks of a zigzag split; all shards visit as many at each step."""

    def place(shard: int, block: int) -> int:
        return (shard if block < blocks else 2 * shards - 2 - shard) * blocks + block

    visited = np.zeros((2 * shards * blocks,) * 2, int)
    for shard in range(shards):
        for i, j in own_pairs(blocks):
            visited[place(shard, i), place(shard, j)] += 1
        for distance in range(1, shards):
            pairs = remote_pairs(blocks, shard >= distance)
            assert len(pairs) == 2 * blocks**2
            for i, j in np.asarray(pairs):
                visited[place(shard, i), place((shard - distance) % shards, j)] += 1
    np.testing.assert_array_equal(visited, np.tri(2 * shards * blocks, dtype=int))


def compile_case(**case):
    arrays, masks = make_inputs(case)
    return make_program(case).lower(*arrays, masks).compile()


@pytest.fixture(autouse=True)
def _keep_block_size(monkeypatch):
    monkeypatch.setattr(ring_attention, "BLOCK", ring_attention.BLOCK)


def test_only_keys_values_and_segments_go_round():
    """Of 4 shards: 3 times what they hold in the forward pass, again in the backward pass, and 4 times gradients.

    Here, without a loop over layers between them, XLA sends the first step of the two passes once.
    """
    text = compile_case(context=4, length=64, block=4, kv_heads=1, packed=True).as_text()
    found = [line for line in text.splitlines() if re.search(rf" (?:{'|'.join(KINDS)})(?:-start)?\(", line)]
    assert all(" collective-permute" in line for line in found)
    keys, segments = "f32[4,2,1,4,8]", "s32[4,2,4]"  # [blocks, B, K, S, H] of one key/value head, [blocks, B, S]
    shapes = [re.search(r"= \(?(\w+\[[\d,]*\])", line)[1] for line in found]
    assert set(shapes) == {keys, segments}
    # Before the loop over the steps between the first and the last (two of them), in it, and after it.
    looped = [shape for line, shape in zip(found, shapes) if "while/body" in line]
    times = {shape: shapes.count(shape) + looped.count(shape) for shape in (keys, segments)}
    assert times == {keys: 2 * (3 + 2 + 4), segments: 3 + 2}


def test_memory_grows_with_the_tokens_of_a_shard_not_with_their_square():
    sizes = [
        compile_case(context=2, length=length, block=64, heads=2).memory_analysis().temp_size_in_bytes
        for length in (2048, 4096)
    ]
    assert sizes[1] <= 2.1 * sizes[0]
    scores = 2 * 2 * 2048 * 2048 * 4  # float32, of one shard: 2 rows, 2 heads
    assert sizes[1] < scores / 10


def test_kernels_for_split_sequences():
    comm = make_setup(GPT, mesh={"context": 2}).context.comm
    whole = make_setup(GPT).context.comm
    facts = {"dtype": jnp.bfloat16, "platform": "gpu", "compute_capability": 9.0}
    plain = {"length": 2048, "masked": False, "alibi": False}
    assert choose_kernel(Context(comm, **facts), 64, **plain) == "ring"
    assert choose_kernel(Context(comm, **facts, context_exchange="all_to_all"), 64, **plain) == "cudnn"
    assert choose_kernel(Context(whole, **facts), 64, **plain) == "cudnn"
    with pytest.raises(UserError, match="all_to_all"):
        choose_kernel(Context(comm, **facts, attention="cudnn"), 64, **plain)


@pytest.mark.parametrize("shards", [2, 4])
def test_rows_are_put_in_order_and_back(shards):
    """`to_rows` undoes the order in which `places` splits a row, along any dim."""
    comm = make_setup(GPT, mesh={"context": shards}).context.comm
    length = 6 * shards
    slices = np.arange(length).reshape(2 * shards, -1)
    order = np.concatenate([np.r_[slices[r], slices[2 * shards - 1 - r]] for r in range(shards)])
    joined = np.stack([order, order + length])
    rows = comm.to_rows(jnp.array(joined), 1)
    np.testing.assert_array_equal(rows, np.arange(2 * length).reshape(2, length))
    np.testing.assert_array_equal(comm.to_shards(rows, 1), joined)
    np.testing.assert_array_equal(comm.to_shards(comm.to_rows(jnp.array(joined.T), 0), 0), joined.T)
