"""Optimizers and learning-rate schedules. The directory is the registry: a config names the dataclasses of its files.

* A schedule is a pure function on the host: `value(run, step, tokens)` in `mtx.optim.warmup`.
* An optimizer is a chain of Optax transformations that returns a direction, not scaled by the learning rate:
  `transformation(axes)` and `learning_rate_at(run, step, tokens)` in `mtx.optim.chain`.

Importing this room imports no JAX.
"""
