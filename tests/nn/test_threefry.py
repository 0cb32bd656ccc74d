"""Keys that compute JAX's random bits in one pass: the same values, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtx.nn.threefry import IMPLEMENTATION

SHAPES = ((), (1,), (7,), (0, 4), (3, 5, 2), (128, 1, 33))
DRAWS = {
    "bits": jax.random.bits,
    "bytes": lambda key, shape: jax.random.bits(key, shape, jnp.uint8),
    "uniform": jax.random.uniform,
    "normal": jax.random.normal,
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_draws_equal_those_of_jax(draw, seed):
    def all_draws(key):
        alone = [draw(key, shape) for shape in SHAPES]
        folded = jax.vmap(lambda i: draw(jax.random.fold_in(key, i), (3, 5)))(jnp.arange(4))
        return [*alone, folded, *(draw(each, (6,)) for each in jax.random.split(key))]

    expected = jax.jit(all_draws)(jax.random.key(seed))
    for ours, jaxs in zip(jax.jit(all_draws)(jax.random.key(seed, impl=IMPLEMENTATION)), expected, strict=True):
        np.testing.assert_array_equal(ours, jaxs)


def test_draws_take_no_temporary_memory():
    def draw(key):
        return jax.random.normal(key, (1024, 1024))

    compiled = jax.jit(draw).lower(jax.random.key(0, impl=IMPLEMENTATION)).compile()
    # Both keys' words and the loop's, not an array.
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


def test_draws_are_sharded_without_communication():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    key = jax.random.key(3, impl=IMPLEMENTATION)
    compiled = jax.jit(lambda key: jax.random.normal(key, (16, 5)), out_shardings=rows).lower(key).compile()
    assert not any(word in compiled.as_text() for word in ("all-reduce", "all-gather", "all-to-all", "permute"))
    np.testing.assert_array_equal(compiled(key), jax.random.normal(jax.random.key(3), (16, 5)))
