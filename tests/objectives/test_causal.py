"""Inputs, targets and weights of the causal objective, by hand."""

import jax
import numpy as np

from mtx.objectives.causal import Causal

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def test_targets_are_the_following_tokens():
    inputs = Causal().inputs({"tokens": TOKENS})
    assert set(inputs) == {"tokens", "targets", "weights"}
    np.testing.assert_array_equal(inputs["tokens"], [[0, 1, 2, 3], [5, 6, 7, 8]])
    np.testing.assert_array_equal(inputs["targets"], [[1, 2, 3, 4], [6, 7, 8, 9]])
    assert inputs["weights"].dtype == np.float32
    np.testing.assert_array_equal(inputs["weights"], np.ones((2, 4)))


def test_targets_of_other_documents_padding_and_fillers_weigh_nothing():
    batch = {
        "tokens": TOKENS,
        "segments": np.int32([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]]),
        "positions": np.int32([[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]),
    }
    inputs = Causal().inputs(batch)
    np.testing.assert_array_equal(inputs["weights"], [[1, 0, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(inputs["segments"], [[1, 1, 2, 2], [1, 1, 1, 0]])
    np.testing.assert_array_equal(inputs["positions"], [[0, 1, 0, 1], [0, 1, 2, 0]])
    weighted = Causal().inputs(batch | {"weights": np.float32([[0] * 4, [1] * 4])})
    np.testing.assert_array_equal(weighted["weights"], [[0, 0, 0, 0], [1, 1, 0, 0]])


def test_traces():
    batch = {"tokens": TOKENS, "weights": np.float32([[1] * 4, [0] * 4])}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(Causal().inputs)(batch), Causal().inputs(batch))
