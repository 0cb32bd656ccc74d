"""What temperature, top-k and top-p leave of a distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtx.errors import UserError
from mtx.inference.sampling import Sampling, choose_tokens

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.1, 0.3])
DRAWS = 4000


def draw(**sampling):
    """Share of each token in many rows of the same distribution."""
    logits = jnp.tile(jnp.log(PROBABILITIES), (DRAWS, 1))
    tokens = choose_tokens(logits, Sampling(**sampling), jax.random.key(0), jnp.int32(3))
    return np.bincount(np.asarray(tokens), minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.75}, [1, 4, 2]),  # 0.4 + 0.3 is not enough
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.8}, [1, 4]),  # of the three, 0.4 / 0.85 + 0.3 / 0.85 is enough
    ],
)
def test_draws_have_the_distribution_that_is_left(sampling, kept):
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    shares = draw(**sampling)
    assert (shares[expected == 0] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / DRAWS**0.5)


def test_temperature_sharpens():
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(draw(temperature=0.5), expected, atol=4 * 0.5 / DRAWS**0.5)
    assert draw(temperature=0.0)[1] == 1


def test_a_draw_depends_on_its_row_and_place_alone():
    logits = jax.random.normal(jax.random.key(1), (8, 50))

    def choose(rows: int, place: int) -> list[int]:
        return choose_tokens(logits[:rows], Sampling(), jax.random.key(0), jnp.int32(place)).tolist()

    assert choose(8, 3)[:2] == choose(2, 3)
    assert choose(8, 3) != choose(8, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": 0.0, "top_k": 5},
    ],
)
def test_values_without_a_meaning_are_refused(sampling):
    with pytest.raises(UserError):
        Sampling(**sampling)
