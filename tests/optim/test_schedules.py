"""Schedules against Optax's, against hand arithmetic, and their cross-field checks."""

import dataclasses

import numpy as np
import optax
import pytest

from mtx.config import schema
from mtx.optim.adamw import AdamW
from mtx.optim.constant import Constant
from mtx.optim.warmup_cosine import WarmupCosine
from mtx.optim.warmup_linear import WarmupLinear
from mtx.optim.warmup_stable_decay import WarmupStableDecay


def make_run(**train):
    return schema.Run(
        model=schema.Model(vocab_size=8, d_model=8, num_layers=1, num_heads=1, max_seq_len=8),
        mesh=schema.Mesh(),
        pipeline=schema.Pipeline(),
        rules=schema.Rules(),
        precision=schema.Precision(),
        train=schema.Train(seq_len=8, global_batch_size=4, **train),
        data=schema.Data(),
        tokenizer=schema.Tokenizer(),
        checkpoint=schema.Checkpoint(),
        health=schema.Health(),
        cluster=schema.Cluster(),
    )


BY_STEPS, BY_TOKENS = make_run(steps=100), make_run(tokens=3200)


def rates(schedule, run, count=110, tokens_per_step=32):
    return [schedule.value(run, step, step * tokens_per_step) for step in range(1, count + 1)]


def test_cosine_is_optax_cosine():
    schedule = WarmupCosine(peak=3e-3, final=1e-4, warmup_steps=10, decay_steps=90)
    reference = optax.schedules.warmup_cosine_decay_schedule(0.0, 3e-3, 10, 90, 1e-4)
    np.testing.assert_allclose(rates(schedule, BY_STEPS), [reference(s) for s in range(1, 111)], rtol=2e-5)


def test_linear_is_optax_linear():
    schedule = WarmupLinear(peak=3e-3, final=1e-4, warmup_steps=10, decay_steps=90)
    reference = optax.schedules.join_schedules(
        [optax.schedules.linear_schedule(0.0, 3e-3, 10), optax.schedules.linear_schedule(3e-3, 1e-4, 80)], [10]
    )
    np.testing.assert_allclose(rates(schedule, BY_STEPS), [reference(s) for s in range(1, 111)], rtol=2e-5)


def test_stable_decay_is_flat_then_linear():
    schedule = WarmupStableDecay(peak=2.0, final=1.0, warmup_steps=20, decay_share=0.25)
    got = rates(schedule, BY_STEPS)  # 80 updates after the warm-up, the last 20 of them decay
    np.testing.assert_allclose(got[:20], 2.0 * np.arange(1, 21) / 20, rtol=1e-12)
    np.testing.assert_allclose(got[20:80], 2.0, rtol=1e-12)
    np.testing.assert_allclose(got[80:100], 2.0 - np.arange(1, 21) / 20, rtol=1e-12)
    assert got[100:] == [1.0] * 10


def test_constant_stays_at_its_peak():
    assert rates(Constant(peak=0.5), BY_STEPS) == [0.5] * 110
    got = rates(Constant(peak=0.5, warmup_tokens=64), BY_STEPS)
    assert got == [0.25] + [0.5] * 109


@pytest.mark.parametrize("cls", [WarmupCosine, WarmupLinear, WarmupStableDecay])
def test_end_of_the_run_is_the_default_end(cls):
    explicit = cls(peak=1.0, final=0.1, warmup_steps=5, decay_steps=100)
    assert rates(cls(peak=1.0, final=0.1, warmup_steps=5), BY_STEPS) == rates(explicit, BY_STEPS)
    assert rates(explicit, BY_STEPS)[99:] == [0.1] * 11


@pytest.mark.parametrize("cls", [WarmupCosine, WarmupLinear, WarmupStableDecay])
def test_tokens_and_steps_agree_where_every_batch_is_equal(cls):
    by_steps = rates(cls(peak=1.0, final=0.1, warmup_steps=5, decay_steps=100), BY_STEPS)
    by_tokens = rates(cls(peak=1.0, final=0.1, warmup_tokens=160, decay_tokens=3200), BY_STEPS)
    of_the_run = rates(cls(peak=1.0, final=0.1, warmup_tokens=160), BY_TOKENS)
    np.testing.assert_allclose(by_tokens, by_steps, rtol=1e-12)
    assert of_the_run == by_tokens
    assert rates(cls(peak=1.0, final=0.1), BY_TOKENS) == rates(cls(peak=1.0, final=0.1, decay_tokens=3200), BY_STEPS)


def test_first_update_moves_and_peak_is_reached_when_promised():
    schedule = WarmupCosine(peak=1.0, warmup_steps=4, decay_steps=8)
    assert schedule.value(BY_STEPS, 1, 32) == 0.25
    assert schedule.value(BY_STEPS, 4, 128) == 1.0
    assert schedule.value(BY_STEPS, 8, 256) == 0.0


def test_learning_rate_of_an_optimizer_is_its_schedule_or_its_number():
    schedule = WarmupLinear(peak=1.0, warmup_steps=4, decay_steps=8)
    assert AdamW(learning_rate=schedule).learning_rate_at(BY_STEPS, 2, 64) == 0.5
    assert AdamW(learning_rate=1).learning_rate_at(BY_STEPS, 2, 64) == 1.0
    with pytest.raises(ValueError, match="numbered from 1"):
        AdamW().learning_rate_at(BY_STEPS, 0, 0)


@pytest.mark.parametrize(
    ("schedule", "run", "keys"),
    [
        (WarmupCosine(peak=1.0, warmup_steps=1, warmup_tokens=1), BY_STEPS, ("warmup_steps", "warmup_tokens")),
        (WarmupCosine(peak=1.0, warmup_steps=1, decay_tokens=9), BY_STEPS, ("warmup_steps", "decay_tokens")),
        (WarmupCosine(peak=1.0, warmup_steps=9, decay_steps=9), BY_STEPS, ("warmup_steps", "decay_steps")),
        (WarmupCosine(peak=1.0, warmup_steps=100), BY_STEPS, ("warmup_steps", "Train.steps")),
        (WarmupCosine(peak=1.0, warmup_tokens=9), BY_STEPS, ("decay_tokens", "Train.steps")),
        (WarmupCosine(peak=1.0, warmup_steps=9), BY_TOKENS, ("decay_steps", "Train.tokens")),
        (WarmupCosine(peak=1.0, final=2.0), BY_STEPS, ("WarmupCosine.final", "WarmupCosine.peak")),
        (Constant(peak=1.0, warmup_steps=1, warmup_tokens=1), BY_STEPS, ("warmup_steps", "warmup_tokens")),
    ],
)
def test_checks_name_both_keys(schedule, run, keys):
    (message,) = schedule.check(run)
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(peak=1.0, warmup_steps=10),
        WarmupCosine(peak=1.0, warmup_tokens=10, decay_tokens=20),
        WarmupStableDecay(peak=1.0),
        Constant(peak=1.0, warmup_tokens=5),
    ],
)
def test_checks_are_silent_where_all_is_well(schedule):
    assert list(schedule.check(BY_STEPS)) == []
    assert list(schedule.check(dataclasses.replace(BY_STEPS, train=dataclasses.replace(BY_STEPS.train, steps=0)))) == []
