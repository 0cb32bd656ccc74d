"""Experts against a reference that sends every token to every expert, and finds slots by counting in a loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from nn.expert_layouts import CASES as LAYOUTS
from programs import run_json
from tiny import GPT, LLAMA, worst_error

from mtx.collectives import Comm
from mtx.config.schema import Model
from mtx.nn.context import Context, Sequence, Tap, no_tap
from mtx.nn.experts import Experts, balance
from mtx.nn.param import define
from mtx.training.remat import rematerialize, tap_for

BATCH, LENGTH = 3, 12
MIXTRAL = Model(**LLAMA, num_experts=6, experts_per_token=2)
SWITCH = Model(**GPT, num_experts=4, experts_per_token=1, expert_capacity_factor=0.75, expert_d_ff=24)
DEEPSEEK = dataclasses.replace(
    MIXTRAL, num_experts=8, experts_per_token=3, num_shared_experts=2, expert_d_ff=16, normalize_expert_weights=False
)
CASES = {
    "top-2 of softmax": MIXTRAL,
    "top-1 with a capacity and biases": SWITCH,
    "top-1 of normalized weights": dataclasses.replace(SWITCH, normalize_expert_weights=True),
    "top-2 with few slots": dataclasses.replace(MIXTRAL, expert_capacity_factor=0.6),
    "top-2 with a slot for all": dataclasses.replace(MIXTRAL, expert_capacity_factor=100.0),
    "top-3 and shared experts": DEEPSEEK,
    "sigmoid and balancing biases": dataclasses.replace(
        DEEPSEEK, router_score="sigmoid", expert_bias_rate=0.1, normalize_expert_weights=True, use_bias=True
    ),
    "all experts, with biases": dataclasses.replace(SWITCH, experts_per_token=4, expert_capacity_factor=None),
}


def make_params(config: Model) -> Any:
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> np.ndarray:
        scale = 0.5 if "router" in axes else 0.3  # scores far from each other: no two change places by rounding
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    definition = define(lambda rngs: Experts(rngs, config))
    return jax.tree.map(draw, definition.params, definition.axes)


def make_inputs(*, padded: bool) -> tuple[np.ndarray, np.ndarray | None]:
    x_BTD = np.random.default_rng(4).standard_normal((BATCH, LENGTH, 32)).astype(np.float32)
    ends = np.array([[LENGTH], [7], [0]])
    return x_BTD, (np.arange(LENGTH) < ends).astype(np.int32) if padded else None


def compute(config: Model, params: Any, x_BTD: jax.Array, segments_BT: np.ndarray | None, tap: Tap = no_tap) -> Any:
    comm = Comm(rules=dict.fromkeys(("seq", "seq_sp", "mlp", "experts", "batch", "layers"), ()), sizes={})
    sequence = Sequence(None, None if segments_BT is None else jnp.asarray(segments_BT), LENGTH)
    experts = define(lambda rngs: Experts(rngs, config)).bind(params)
    return experts(x_BTD, sequence, Context(comm), tap)


jitted = jax.jit(compute, static_argnums=0)


def activate(p: Any, x: jax.Array, expert: int | None) -> jax.Array:
    """One MLP; of a stack of them, the given one."""

    def linear(p: Any, x: jax.Array) -> jax.Array:
        pick = (lambda a: a) if expert is None else (lambda a: a[expert])
        return x @ pick(p["weight"]) + (pick(p["bias"]) if "bias" in p else 0)

    if "gate" in p:
        return linear(p["down"], jax.nn.silu(linear(p["gate"], x)) * linear(p["up"], x))
    return linear(p["down"], jax.nn.gelu(linear(p["up"], x)))


@dataclasses.dataclass
class Routes:
    """What the reference finds by counting."""

    chosen_BTE: np.ndarray
    kept_BTE: np.ndarray
    load_BE: np.ndarray
    dropped: int


def find_routes(config: Model, params: Any, x_BTD: np.ndarray, valid_BT: np.ndarray) -> Routes:
    router, choices, experts = params["router"], config.experts_per_token, config.num_experts
    logits = x_BTD @ router["score"]["weight"]
    odds = np.exp(logits)
    scores = odds / odds.sum(-1, keepdims=True) if config.router_score == "softmax" else odds / (1 + odds)
    order = np.argsort(-(scores + router.get("balance_bias", 0)), axis=-1)[..., :choices]
    slots = math.inf
    if config.expert_capacity_factor is not None:
        slots = math.ceil(config.expert_capacity_factor * choices * LENGTH / experts)
    kept, load, dropped = np.zeros((BATCH, LENGTH, experts)), np.zeros((BATCH, experts)), 0
    for b, k, t in itertools.product(range(BATCH), range(choices), range(LENGTH)):
        if valid_BT[b, t]:
            expert = order[b, t, k]
            kept[b, t, expert] = load[b, expert] < slots
            dropped += load[b, expert] >= slots
            load[b, expert] += 1
    return Routes((np.arange(experts) == order[..., None]).any(-2), kept, load, dropped)


def reference(config: Model, routes: Routes, valid_BT: np.ndarray, params: Any, x_BTD: jax.Array) -> Any:
    choices, experts = config.experts_per_token, config.num_experts
    logits = x_BTD @ params["router"]["score"]["weight"]
    scores = jax.nn.softmax(logits) if config.router_score == "softmax" else 1 / (1 + jnp.exp(-logits))
    weights = scores
    normalize = config.normalize_expert_weights
    if normalize or (normalize is None and choices > 1):
        weights = scores / (scores * routes.chosen_BTE).sum(-1, keepdims=True)
    y_BTD = sum((weights * routes.kept_BTE)[..., e, None] * activate(params, x_BTD, e) for e in range(experts))
    if config.num_shared_experts:
        y_BTD = y_BTD + activate(params["shared"], x_BTD, None)
    shares = scores / scores.sum(-1, keepdims=True)
    balance_loss, z_loss = 0.0, 0.0
    for b in range(BATCH):
        tokens = valid_BT[b].sum()
        if tokens:
            mean_E = (shares[b] * valid_BT[b][:, None]).sum(0) / tokens
            balance_loss += experts / (choices * tokens) * (routes.load_BE[b] * mean_E).sum()
            z_loss += (jnp.log(jnp.exp(logits[b]).sum(-1)) ** 2 * valid_BT[b]).sum() / tokens
    counts = {"expert_load": routes.load_BE.sum(0), "dropped": routes.dropped}
    return y_BTD, {"load_balance_loss": balance_loss, "router_z_loss": z_loss, **counts}


RARE = ("top-1 of normalized weights", "top-2 with a slot for all", "all experts, with biases")


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        *(pytest.param(name, True, marks=[pytest.mark.slow] if name in RARE else []) for name in CASES),
        ("top-2 with few slots", False),
    ],
)
def test_output_extras_and_gradients_equal_the_reference(name, padded):
    config, params = CASES[name], make_params(CASES[name])
    x_BTD, segments_BT = make_inputs(padded=padded)
    valid_BT = np.ones((BATCH, LENGTH)) if segments_BT is None else (segments_BT > 0).astype(float)
    routes = find_routes(config, params, x_BTD, valid_BT)
    cotangent_BTD = np.random.default_rng(5).standard_normal(x_BTD.shape)

    def differentiate(layer: Any) -> Any:
        def objective(params: Any, x_BTD: jax.Array) -> Any:
            y_BTD, extras = layer(params, x_BTD)
            total = (y_BTD * cotangent_BTD).sum() + 3 * extras["load_balance_loss"] + 2 * extras["router_z_loss"]
            return total, (y_BTD, extras)

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(params, x_BTD)

    (_, actual), grads = differentiate(lambda params, x: compute(config, params, x, segments_BT))
    (_, expected), expected_grads = differentiate(partial(reference, config, routes, valid_BT))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-5 * np.abs(expected[0]).max())
    assert actual[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        np.testing.assert_allclose(actual[1][key], value, rtol=1e-6, err_msg=key)
    if config.expert_capacity_factor and config.expert_capacity_factor < 1:
        assert routes.dropped >= 3  # or the test would show nothing
    worst, error = worst_error(grads, expected_grads)
    assert error < 1e-5, worst


def test_balancing_biases_change_the_choice_and_nothing_else():
    config = dataclasses.replace(MIXTRAL, experts_per_token=1, expert_bias_rate=0.1)
    params, (x_BTD, _) = make_params(config), make_inputs(padded=False)
    params["router"]["balance_bias"] = np.eye(6, dtype=np.float32)[2] * 9
    y_BTD, extras = jitted(config, params, x_BTD, None)
    assert list(extras["expert_load"]) == [0, 0, BATCH * LENGTH, 0, 0, 0]
    scores = jax.nn.softmax(x_BTD @ params["router"]["score"]["weight"])  # one expert: weights are not normalized
    np.testing.assert_allclose(y_BTD, scores[..., 2:3] * activate(params, x_BTD, 2), rtol=1e-4, atol=1e-5)


def test_even_load_and_equal_scores_have_a_balance_loss_of_one_per_row():
    params, (x_BTD, _) = make_params(MIXTRAL), make_inputs(padded=False)
    params["router"]["score"]["weight"] *= 0
    _, extras = jitted(MIXTRAL, params, x_BTD, None)
    assert float(extras["load_balance_loss"]) == pytest.approx(BATCH)
    assert float(extras["router_z_loss"]) == pytest.approx(BATCH * math.log(6) ** 2)


def count_products(recompute: str, config: Model, params: Any, x_BTD: np.ndarray) -> int:
    """Matrix products of a layer's forward and backward pass."""

    def layer(params: Any, x_BTD: jax.Array) -> jax.Array:
        return compute(config, params, x_BTD, None, tap_for(recompute))[0]

    kept = rematerialize(layer, recompute, (), scanned=True)
    program = jax.make_jaxpr(jax.grad(lambda params, x_BTD: kept(params, x_BTD).sum(), argnums=(0, 1)))(params, x_BTD)

    def count(jaxpr: Any) -> int:
        inner = sum(count(sub) for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params))
        return inner + sum(e.primitive.name in ("dot_general", "ragged_dot_general") for e in jaxpr.eqns)

    return count(program.jaxpr)


@pytest.mark.parametrize("name", ["top-2 with few slots", "top-3 and shared experts"])
def test_selective_recomputation_repeats_no_product(name):
    config, params, (x_BTD, _) = CASES[name], make_params(CASES[name]), make_inputs(padded=False)
    products = {
        recompute: count_products(recompute, config, params, x_BTD) for recompute in ("none", "selective", "full")
    }
    assert products["none"] == 3 * (4 + 3 * (config.num_shared_experts > 0))  # forward, and two for each backward
    assert products["selective"] == products["none"] < products["full"]


def test_balance_moves_biases_towards_the_mean():
    bias_LE = jnp.asarray([[0.5, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    weight_LDE = jnp.ones((2, 3, 4))
    stack = {"feedforward": {"router": {"balance_bias": bias_LE, "score": {"weight": weight_LDE}}}}
    moved = balance(stack, jnp.asarray([[9.0, 1.0, 4.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 0.1)
    router = moved["feedforward"]["router"]
    np.testing.assert_allclose(router["balance_bias"], [[0.4, 0.1, 0.0, 0.1], [1.0, 2.0, 3.0, 4.0]], rtol=1e-6)
    np.testing.assert_array_equal(router["score"]["weight"], weight_LDE)


EVERY_LAYOUT = [
    pytest.param("deepseek", ["expert2 tensor2 data2"], id="deepseek"),
    *(pytest.param(name, [], marks=pytest.mark.slow, id=f"{name}, all") for name in LAYOUTS),
]


@pytest.mark.parametrize(("name", "layouts"), EVERY_LAYOUT)
def test_layouts_agree_with_one_device(name, layouts):
    results = run_json("nn/expert_layouts.py", name, *layouts, devices=8)
    assert set(results) == set(layouts or LAYOUTS[name])
    for layout, (loss_error, worst, error) in results.items():
        assert loss_error < 1e-6, layout
        assert error < 1e-5, (layout, worst)


@pytest.mark.slow
def test_steps_count_tokens_and_move_biases_alike_on_all_layouts():
    alone, pipeline = run_json("nn/expert_layouts.py", "steps", devices=8)
    assert alone.keys() == pipeline.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(pipeline[name], value, rtol=1e-5, err_msg=name)
    assert sum(alone["expert_load"]) == pytest.approx(1)
    assert alone["dropped_tokens"] > 20
    # Two steps of 0.01 for experts with less or more than the mean.
    steps = np.round(np.abs(alone["balance_bias"]) / 0.01, 4)
    assert set(steps.flat) <= {0, 1, 2}
    assert steps.sum() > 10
