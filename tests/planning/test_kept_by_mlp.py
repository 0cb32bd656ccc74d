"""What the estimates count of an MLP's kept values is what JAX's derivative keeps."""

import jax
import jax.numpy as jnp
import pytest

from mtx.collectives import Comm
from mtx.config import schema
from mtx.config.axes import LOGICAL_AXES, MESH_AXES
from mtx.models import define_model
from mtx.nn.context import Context, Sequence, no_tap
from mtx.planning.activations import KEPT_OF_HIDDEN

TOKENS, WIDE = 48, 112


@pytest.mark.parametrize("activation", KEPT_OF_HIDDEN)
def test_the_counts_are_those_of_the_derivative(activation):
    model = schema.Model(
        vocab_size=1000, d_model=80, num_layers=2, num_heads=5, max_seq_len=TOKENS, d_ff=WIDE, activation=activation
    )
    (layer,) = define_model(model).layers.values()
    comm = Comm(rules=dict.fromkeys(LOGICAL_AXES, ()), sizes=dict.fromkeys(MESH_AXES, 1))
    context = Context(comm=comm, dtype=jnp.bfloat16, platform="cpu")

    def kept(weights, x_BTD):
        def forward(weights, x_BTD):
            return layer.bind(weights)(x_BTD, Sequence(None, None, TOKENS), None, context, None, no_tap)[0]

        return jax.vjp(forward, weights, x_BTD)[1]

    weights = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16 if a.ndim > 1 else a.dtype), layer.params
    )
    found = jax.tree.leaves(jax.eval_shape(kept, weights, jax.ShapeDtypeStruct((1, TOKENS, 80), jnp.bfloat16)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in found if leaf.shape == (1, TOKENS, WIDE))
    newer = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
    saved = 1 if newer and activation in ("gelu_tanh", "geglu") else 0  # of the polynomial under tanh
    assert size == (KEPT_OF_HIDDEN[activation] - saved) * TOKENS * WIDE * 2
