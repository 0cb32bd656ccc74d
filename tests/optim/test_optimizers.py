"""The contract of every optimizer in the directory, then each against Optax's own."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import mtx.optim
from mtx.config import schema
from mtx.optim.adafactor import Adafactor
from mtx.optim.adamw import AdamW
from mtx.optim.decay import decay_mask
from mtx.optim.lion import Lion
from mtx.optim.muon import Muon
from mtx.optim.state import abstract_state

AXES = {
    "embedding": {"table": ("vocab", "embed")},
    "layers": {
        "attention": {"weight": ("layers", "embed", "heads"), "bias": ("layers", "heads")},
        "experts": {"weight": ("layers", "experts", "embed", "mlp")},
    },
    "norm": {"gain": ("embed",)},
}
SIZES = {"vocab": 24, "layers": 3, "embed": 8, "heads": 12, "experts": 2, "mlp": 16}


def is_axes(node):
    return isinstance(node, tuple)


def draw(seed, axes=AXES, sizes=SIZES):
    leaves, tree = jax.tree.flatten(axes, is_leaf=is_axes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.float32(rng.normal(size=[sizes[a] for a in names])) for names in leaves])


def optimizers():
    modules = [importlib.import_module(f"mtx.optim.{m.name}") for m in pkgutil.iter_modules(mtx.optim.__path__)]
    found = {c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, schema.Optimizer)}
    return sorted(found - {schema.Optimizer}, key=lambda c: c.__name__)


every_optimizer = pytest.mark.parametrize("cls", optimizers(), ids=lambda c: c.__name__)


def build(optimizer, axes=AXES):
    return optimizer.transformation(jax.eval_shape(lambda: draw(0, axes)), axes)


def first_update(transformation):
    """The function (gradients, params) -> (direction, state)."""
    return jax.jit(lambda gradients, params: transformation.update(gradients, transformation.init(params), params))


def trajectory(transformation, params, gradients_of, steps=4):
    """Parameters after some updates at a rate of 0.1."""

    @jax.jit
    def step(params, state, gradients):
        direction, state = transformation.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, direction), state

    state = jax.jit(transformation.init)(params)
    for i in range(steps):
        params, state = step(params, state, gradients_of(i))
    return params


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **tolerance), got, want)


def test_there_are_optimizers():
    assert {AdamW, Adafactor, Lion, Muon} <= set(optimizers())


@every_optimizer
def test_descends_a_quadratic_in_one_program(cls):
    transformation = build(cls(weight_decay=0.0))
    params, target = draw(0), draw(1)

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target)))

    @jax.jit
    def step(params, state, rate):
        direction, state = transformation.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, direction), state

    state, start = transformation.init(params), loss(params)
    for i in range(60):
        params, state = step(params, state, 0.2 * (1 - i / 60))
    assert loss(params) < 0.3 * start
    assert step._cache_size() == 1  # neither the rate nor the state makes a new program


@every_optimizer
def test_decay_alone_moves_matrices_alone(cls):
    transformation, params = build(cls(weight_decay=0.25)), draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    direction, _ = first_update(transformation)(zeros, params)
    want = jax.tree.map(lambda p, decays: 0.25 * p if decays else 0 * p, params, decay_mask(AXES))
    assert_trees_close(direction, want, rtol=1e-6, atol=1e-12)


def test_what_decays():
    assert decay_mask(AXES) == {
        "embedding": {"table": True},
        "layers": {"attention": {"weight": True, "bias": False}, "experts": {"weight": True}},
        "norm": {"gain": False},
    }
    assert decay_mask({"router": ("layers", "embed", "experts"), "table": ("positions", "embed")}) == {
        "router": True,
        "table": True,
    }
    assert decay_mask({"bias": ("layers", "experts", "mlp"), "gain": ("layers", "embed")}) == {
        "bias": False,
        "gain": False,
    }


@every_optimizer
def test_gradient_is_clipped_before_all_else(cls):
    params, gradients = draw(0), draw(1)
    norm = optax.tree.norm(gradients)
    unclipped, clipped = (first_update(build(cls(clip_norm=limit))) for limit in (None, 0.5))
    scaled = jax.tree.map(lambda g: g * (0.5 / norm), gradients)
    assert_trees_close(clipped(gradients, params), unclipped(scaled, params), rtol=1e-4, atol=1e-6)
    small = jax.tree.map(lambda g: g * (0.4 / norm), gradients)
    assert_trees_close(clipped(small, params), unclipped(small, params), rtol=0, atol=0)


@every_optimizer
def test_layers_of_a_stack_do_not_know_each_other(cls):
    sizes = SIZES | {"embed": 128, "mlp": 130, "heads": 132}  # wide enough to be factored
    axes = {"layers": AXES["layers"]}
    optimizer = cls(clip_norm=None)
    update = first_update(build(optimizer, axes))
    params, gradients = draw(0, axes, sizes), draw(1, axes, sizes)
    # Layers of very different scale, so that a statistic over the stack would show.
    params, gradients = jax.tree.map(lambda a: a * jnp.exp2(jnp.arange(3.0)).reshape(3, *[1] * (a.ndim - 1)) ** 4,
                                     (params, gradients))  # fmt: skip
    whole, _ = update(gradients, params)
    for i in (0, 2):
        one, its_gradients, want = jax.tree.map(lambda a: a[i : i + 1], (params, gradients, whole))  # noqa: B023
        alone, _ = update(its_gradients, one)
        assert_trees_close(alone, want, rtol=2e-3, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_float32_placed_and_stable(cls, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), draw(0))
    transformation = build(cls())
    of_param, replicated = (
        SingleDeviceSharding(jax.devices()[0]),
        SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host"),
    )
    shardings = jax.tree.map(lambda _: of_param, params)
    abstract = abstract_state(transformation, params, shardings, replicated)
    state = jax.jit(transformation.init)(params)
    direction, after = jax.jit(transformation.update)(params, state, params)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(abstract) == shapes(state) == shapes(after)
    assert {leaf.dtype for leaf in jax.tree.leaves(direction)} == {jnp.dtype(jnp.float32)}
    leaves = jax.tree.leaves(abstract)
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    moments = [leaf for leaf in leaves if leaf.sharding == of_param]
    assert all(leaf.sharding in (of_param, replicated) for leaf in leaves)
    assert sum(leaf.size for leaf in moments) >= sum(p.size for p in jax.tree.leaves(params))


def test_fields_that_every_optimizer_has():
    for cls in optimizers():
        names = {field.name for field in dataclasses.fields(cls)}
        assert {"learning_rate", "weight_decay", "clip_norm"} <= names, cls


# Each against Optax's own.


def test_adamw_is_optax_adamw():
    ours = build(AdamW(weight_decay=0.3, clip_norm=2.0, beta1=0.8, beta2=0.9, eps=1e-6))
    theirs = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.adamw(-1.0, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, mask=decay_mask(AXES)),
    )
    got, want = (trajectory(t, draw(0), lambda i: draw(i + 10)) for t in (ours, theirs))
    assert_trees_close(got, want, rtol=1e-5, atol=1e-6)


def test_lion_is_optax_lion():
    ours = build(Lion(weight_decay=0.3, clip_norm=None, beta1=0.8, beta2=0.95))
    theirs = optax.lion(-1.0, b1=0.8, b2=0.95, weight_decay=0.3, mask=decay_mask(AXES))
    got, want = (trajectory(t, draw(0), lambda i: draw(i + 10)) for t in (ours, theirs))
    assert_trees_close(got, want, rtol=1e-5, atol=1e-6)


def test_adafactor_is_optax_adafactor_on_one_matrix():
    axes = {"table": ("vocab", "embed"), "gain": ("embed",)}
    sizes = {"vocab": 24, "embed": 16}
    params = draw(0, axes, sizes)
    ours = build(Adafactor(min_dim_to_factor=8, decay_exponent=0.7, update_clip=1.5), axes)
    theirs = optax.adafactor(-1.0, min_dim_size_to_factor=8, decay_rate=0.7, clipping_threshold=1.5)
    got, want = (trajectory(t, params, lambda i: draw(i + 10, axes, sizes)) for t in (ours, theirs))
    assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
    state = jax.tree.leaves(jax.eval_shape(ours.init, params))
    assert sum(leaf.size for leaf in state) < 24 * 16 / 2  # a row and a column, not the matrix


@every_optimizer
def test_stacks_of_different_depths_are_each_on_their_own(cls):
    def both(seed):
        return {"layers": draw(seed)["layers"], "expert_layers": draw(seed, AXES, {**SIZES, "layers": 5})["layers"]}

    axes = {"layers": AXES["layers"], "expert_layers": AXES["layers"]}
    together = cls(clip_norm=None).transformation(both(0), axes)
    alone = cls(clip_norm=None).transformation(
        {"expert_layers": both(0)["expert_layers"]}, {"expert_layers": AXES["layers"]}
    )
    direction, _ = first_update(together)(both(1), both(0))
    want, _ = first_update(alone)(
        {"expert_layers": both(1)["expert_layers"]}, {"expert_layers": both(0)["expert_layers"]}
    )
    assert_trees_close(direction["expert_layers"], want["expert_layers"], rtol=1e-5, atol=1e-6)


def test_muon_is_optax_muon_on_matrices_and_adamw_elsewhere():
    decay = {"weight_decay": 0.3, "clip_norm": None}
    got = trajectory(build(Muon(**decay, momentum=0.9, rms=0.1, beta1=0.8, beta2=0.9)), draw(0), lambda i: draw(i + 10))
    adamw = trajectory(build(AdamW(**decay, beta1=0.8, beta2=0.9)), draw(0), lambda i: draw(i + 10))

    def matrices(tree):
        return dict(enumerate(tree["layers"]["attention"]["weight"]))

    muon = optax.contrib.muon(-1.0, beta=0.9, weight_decay=0.3, consistent_rms=0.1)
    want = trajectory(muon, matrices(draw(0)), lambda i: matrices(draw(i + 10)))
    assert_trees_close(matrices(got), want, rtol=1e-4, atol=1e-5)
    others = [(t["embedding"], t["norm"], t["layers"]["attention"]["bias"]) for t in (got, adamw)]
    assert_trees_close(*others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [(AdamW(weight_decay=0.0), 1.0), (Lion(weight_decay=0.0), 1.0), (Muon(weight_decay=0.0), 0.2)],
)
def test_direction_has_the_promised_size(optimizer, size):
    transformation, params = build(optimizer), draw(0)
    direction, _ = first_update(transformation)(draw(1), params)
    weight = direction["layers"]["attention"]["weight"]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(weight**2)), size, rtol=0.25)
    assert np.vdot(weight, draw(1)["layers"]["attention"]["weight"]) > 0  # up: the step subtracts it
