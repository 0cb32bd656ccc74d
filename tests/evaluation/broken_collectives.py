"""Prints what the certificate of a run says when a collective is broken, as JSON. Run with 2 devices.

The mistakes are put into the code of the process: nothing that a user can set breaks a collective.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from tiny import GPT, make_run

from mtx.collectives import Comm
from mtx.config import schema
from mtx.evaluation.certify import compare_layout, compute_reference
from mtx.training import forward

LAYERS = 2
RUN = make_run({**GPT, "num_layers": LAYERS}, train={"global_batch_size": 2})
LAYOUTS = {"tensor": schema.Mesh(data=1, tensor=2), "data": schema.Mesh(data=2)}
LAYER = 1
"""Where the mistake is."""


def break_output(mistake: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The sum after attention, wrong in one layer: the calls with these names come once per layer, in order."""
    layers, right = itertools.cycle(range(LAYERS)), Comm.reduce

    def reduce(comm: Comm, x: jax.Array, contracted: str, source: str, target: str, dim: int) -> jax.Array:
        here = contracted == "heads" and next(layers) == LAYER
        return (mistake if here else right)(comm, x, contracted, source, target, dim)

    return reduce


def forget_the_sum(comm: Comm, x: jax.Array, contracted: str, source: str, target: str, dim: int) -> jax.Array:
    return comm.split(x, source, target, dim)


def spoil_the_gradient(comm: Comm, *arguments: Any, right: Any = Comm.reduce) -> jax.Array:
    """Right in the forward pass; in the backward pass half as much again."""
    y = right(comm, *arguments)
    return y + 0.5 * (y - jax.lax.stop_gradient(y))


def count_twice(comm: Comm, g: jax.Array, placement: Any, right: Any = Comm.reduce_gradient) -> jax.Array:
    return 2 * right(comm, g, placement)


def lose_digits(comm: Comm, x: jax.Array, *names: Any, right: Any = Comm.reduce) -> jax.Array:
    return right(comm, x, *names) * float("nan")


MISTAKES: dict[str, tuple[str, str, Any]] = {
    # name: layout, method of Comm, what it does instead
    "none": ("tensor", "reduce", Comm.reduce),
    "forward": ("tensor", "reduce", break_output(forget_the_sum)),
    "backward": ("tensor", "reduce", break_output(spoil_the_gradient)),
    "nan": ("tensor", "reduce", break_output(lose_digits)),
    "gradients": ("data", "reduce_gradient", count_twice),
}


def main() -> None:
    forward.trace_once = lambda layer: layer  # or the mistake of one layer would be in all
    expected, results = compute_reference(RUN), {}
    for name, (layout, method, mistake) in MISTAKES.items():
        right = getattr(Comm, method)
        setattr(Comm, method, mistake)
        results[name] = dataclasses.asdict(compare_layout(dataclasses.replace(RUN, mesh=LAYOUTS[layout]), expected))
        setattr(Comm, method, right)
    print(json.dumps(results, allow_nan=False))


if __name__ == "__main__":
    main()
