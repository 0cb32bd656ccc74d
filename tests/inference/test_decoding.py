"""Decoding: the same tokens with and without caches, whatever the architecture, the padding and the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from programs import run_json
from tiny import GPT, LLAMA, make_params, make_setup

from mtx.errors import UserError
from mtx.inference.decoding import Generator
from mtx.inference.layout import for_inference
from mtx.inference.logits import compute_logits
from mtx.inference.sampling import Sampling

SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.95)
LONG = {"max_seq_len": 48}
MODELS: dict[str, dict[str, Any]] = {
    "learned": {**GPT, **LONG},
    "rotary": {**LLAMA, **LONG},
    "alibi": {**GPT, **LONG, "position": "alibi", "num_kv_heads": 1},
}


def make_generator(name: str) -> tuple[Generator, Any]:
    # In bfloat16, as trained: inference must not be.
    setup = make_setup(MODELS[name], precision={"compute": "bfloat16"})
    return Generator(for_inference(setup)), make_params(setup)


@pytest.mark.parametrize("name", MODELS)
def test_caches_change_no_token(name):
    cached, params = make_generator(name)
    plain = Generator(cached.setup, use_cache=False)
    for prompt in ([3, 1, 4, 1, 5], list(range(16))):  # padded, and as long as its bucket
        arguments: dict[str, Any] = {"max_tokens": 12, "sampling": SAMPLED, "seed": 7, "num_samples": 3}
        rows = cached.generate(params, prompt, **arguments)
        assert [len(row) for row in rows] == [12, 12, 12]
        assert rows == plain.generate(params, prompt, **arguments)
    assert rows != cached.generate(params, prompt, **{**arguments, "seed": 8})


@pytest.fixture(scope="module")
def learned():
    return make_generator("learned")


def test_greedy_tokens_are_the_most_likely_ones(learned):
    generator, params = learned
    prompt, sampling = [3, 1, 4, 1, 5], Sampling(temperature=0)
    (row,) = generator.generate(params, prompt, max_tokens=10, sampling=sampling)
    logits = compute_logits(generator.setup, params, np.array([prompt + row]))[0]
    assert row == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert generator.generate(params, prompt, max_tokens=10, sampling=sampling, seed=5) == [row]


def test_stops_at_the_end_of_the_document_and_at_the_longest_sequence(learned):
    generator, params = learned
    sampling = Sampling(temperature=0)
    (row,) = generator.generate(params, [3, 1, 4], max_tokens=1000, sampling=sampling)
    assert len(row) == 45  # of Model.max_seq_len = 48
    (cut,) = generator.generate(params, [3, 1, 4], max_tokens=1000, sampling=sampling, end_id=row[4])
    assert cut == row[: row.index(row[4]) + 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 48, "has 48 tokens and this model takes 48"),
        ([], "one or more token ids"),
        ([96], "from 0 to 95"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(learned, prompt, message):
    generator, params = learned
    with pytest.raises(UserError, match=message):
        generator.generate(params, prompt, max_tokens=1, sampling=Sampling())


def test_tokens_do_not_depend_on_the_layout():
    results = run_json("inference/decoding_layouts.py", devices=8)
    assert len(results) == 3
    for name, (tokens, logit_error) in results.items():
        assert tokens["one device"] == tokens["sharded"], name
        # float32 sums in another order, of logits of size 5
        assert logit_error < 1e-5, name
