"""The optimizer's update where its moments live on the host: those of a few parameters are on the devices at a time.

Decides the order in which moments come and go; what is done with them is the optimizer's, and where they live between
steps is the state's.

    gradients --> moments of parameters 0 and 1 come --> update 0 --> moments of 2 come --> update 1 --> ...

Barriers make that order: left alone, XLA starts all copies with the step, and the moments lie on the devices during the
whole of it. Of a barrier, what comes out must be used, or XLA drops its operand.

Invariant: the result is that of one update of everything.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

IN_FLIGHT = 2
"""Parameters whose moments are on the devices: one is updated while the next one's moments come."""


def update_in_turn(
    transformation: optax.GradientTransformation, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """`transformation.update(grads, state, params)`, one parameter after the other.

    Every parameter's moments must follow from its own and from all gradients. Called under jit: of each update that is
    traced here, all but one parameter's part is dead code.

    Returns:
        Directions, and the state, in device memory.
    """
    num_params, unflatten = len(jax.tree.leaves(params)), partial(jax.tree.unflatten, jax.tree.structure(params))
    owners = jax.tree.leaves(
        optax.tree.map_params(
            transformation,
            lambda leaf, number: leaf if isinstance(leaf, optax.MaskedNode) else number,
            state,
            unflatten(range(num_params)),
            transform_non_params=lambda leaf: -1,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    )
    values, unflatten_state = jax.tree.leaves(state), partial(jax.tree.unflatten, jax.tree.structure(state))
    values, grads = lax.optimization_barrier((values, grads))  # nothing comes before the backward pass is over
    elsewhere = [jnp.zeros(value.shape, value.dtype) if owner >= 0 else value for value, owner in zip(values, owners)]
    directions: list[jax.Array] = []
    updated = list(values)
    for number in range(num_params):
        mine = {place: values[place] for place, owner in enumerate(owners) if owner == number}
        if number >= IN_FLIGHT:
            before = number - IN_FLIGHT
            mine, directions[before] = lax.optimization_barrier((mine, directions[before]))
        mine = jax.device_put(mine, jax.memory.Space.Device)
        given = [mine.get(place, value) for place, value in enumerate(elsewhere)]
        direction, after = transformation.update(grads, unflatten_state(given), params)
        directions.append(jax.tree.leaves(direction)[number])
        for place, value in enumerate(jax.tree.leaves(after)):
            if owners[place] in (number, -1):
                updated[place] = value
    return unflatten(directions), unflatten_state(updated)
