"""Products of 8-bit numbers: their rounding, their scales, their gradients, and steps that are made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROUND_AS_WRITTEN, run_json
from tiny import GPT, LLAMA, make_run

from mtx.config.checks import check_run
from mtx.config.layout import check_layout
from mtx.errors import UserError
from mtx.nn import float8
from mtx.nn.float8 import GRADIENT, INPUT, choose_scale, round_input
from mtx.planning.hardware import GPUS

FLOAT8 = {"precision": {"compute": "float8"}}
WIDE = {**LLAMA, "d_model": 64, "max_seq_len": 32}


def draw(seed: int, shape: tuple[int, ...], size: float = 1.0) -> jax.Array:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(jnp.bfloat16)


@jax.jit
def multiply(x, w, dy):
    y, pull = jax.vjp(lambda x, w: float8.multiply(round_input(x), w), x, w)
    return y, *pull(dy)


def float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


# Half a unit in the last place of 1 + 3 and of 1 + 2 binary digits.
DIGITS = {"input": 2.0**-4, "gradient": 2.0**-3}


def test_a_product_and_its_gradients_keep_the_bounds_of_the_formats():
    x, w, dy = draw(0, (2, 32, 256), 3.0), draw(1, (256, 128), 0.02), draw(2, (2, 32, 128), 1e-6)
    actual = float64(*multiply(x, w, dy))
    x, w, dy = float64(x.reshape(-1, 256), w, dy.reshape(-1, 128))
    factors = ((x, w, "input"), (dy, w.T, "gradient"), (x.T, dy, "gradient"))
    for found, (a, b, kind) in zip(actual, factors):
        worst = (1 + DIGITS["input"]) * (1 + DIGITS[kind]) * (1 + 2.0**-8) - 1
        # What is below the smallest normal number is off by half of the smallest one at most.
        tiny = 2.0**-17 * (np.abs(a).max() * np.abs(b).sum(0).max() + np.abs(b).max() * np.abs(a).sum(1).max())
        found = found.reshape(-1, found.shape[-1])
        assert np.all(np.abs(found - a @ b) <= worst * (np.abs(a) @ np.abs(b)) + tiny)
        error = np.linalg.norm(found - a @ b) / np.linalg.norm(a @ b)
        assert 0.01 < error < 0.08  # rounded to 8 bits, and no worse than that


def test_the_numbers_are_those_of_8_bits_exactly():
    """Against products in float64 of the numbers that hardware would see: only the sum's order and one rounding."""
    x, w, dy = draw(0, (64, 1024), 3.0), draw(1, (1024, 32), 0.02), draw(2, (64, 32), 1e-6)

    def narrow(a, kind):
        scale = float(choose_scale(a, kind))
        assert np.log2(scale) == round(np.log2(scale))
        return (np.asarray(a, np.float32) / scale).astype(kind).astype(np.float64) * scale

    x8, w8, dy8 = narrow(x, INPUT), narrow(w, INPUT), narrow(dy, GRADIENT)
    for found, expected in zip(float64(*multiply(x, w, dy)), (x8 @ w8, dy8 @ w8.T, x8.T @ dy8)):
        np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [INPUT, GRADIENT])
@pytest.mark.parametrize("largest", [1.0, 1.75, 1.76, 447.0, 3e38, 1e-3, 2.0**-40])
def test_the_largest_number_uses_the_range_and_stays_in_it(kind, largest):
    scale = float(choose_scale(jnp.array([0.0, -largest], jnp.bfloat16), kind))
    limit = float(jnp.finfo(kind).max)
    assert limit / 2 < np.float64(jnp.bfloat16(largest)) / scale <= limit


def test_zeros_and_tiny_and_huge_numbers():
    x, w, dy = draw(0, (16, 32)), draw(1, (32, 16)), draw(2, (16, 16))
    usual = multiply(x, w, dy)
    for array in multiply(0 * x, w, 0 * dy):
        assert not np.any(np.asarray(array, np.float32))
    for power in (-30, 30, 100):  # scales are powers of two: nothing is rounded otherwise
        factor = jnp.bfloat16(2.0**power)
        y, dx, dw = multiply(factor * x, w, dy)
        np.testing.assert_array_equal(y, factor * usual[0])
        np.testing.assert_array_equal(dx, usual[1])
        np.testing.assert_array_equal(dw, factor * usual[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(bad):
    x, w, dy = draw(0, (16, 32)), draw(1, (32, 16)), draw(2, (16, 16))
    y, _, dw = multiply(jnp.asarray(x).at[0, 0].set(bad), w, dy)
    assert np.isnan(np.asarray(y, np.float32)).all()
    assert np.isnan(np.asarray(dw, np.float32)).all()
    _, dx, dw = multiply(x, w, jnp.asarray(dy).at[0, 0].set(bad))
    assert np.isnan(np.asarray(dx, np.float32)).all()
    assert np.isnan(np.asarray(dw, np.float32)).all()


def test_what_checkpoint_keeps_has_the_whole_range():
    """`jax.checkpoint` rounds floats that it keeps, and would take 448 for an overflow."""
    x, w = jnp.full((16, 16), 447, jnp.bfloat16), jnp.ones((16, 16), jnp.bfloat16)

    def loss(w):
        return jnp.sin(float8.multiply(round_input(x), w).astype(jnp.float32)).sum()

    kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.everything_saveable)
    expected, found = jax.jit(jax.grad(loss))(w), jax.jit(jax.grad(kept))(w)
    assert np.isfinite(np.asarray(expected, np.float32)).all()
    assert np.any(np.asarray(expected, np.float32))
    np.testing.assert_array_equal(found, expected)


def test_the_input_is_kept_in_one_byte():
    x, w = jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 16), jnp.bfloat16)
    _, pull = jax.vjp(lambda w: float8.multiply(round_input(x), w), w)
    kept = {leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape}
    assert kept == {jnp.dtype(jnp.uint8)}


@pytest.mark.slow
def test_layouts_differ_by_a_rounding():
    results = run_json("nn/float8_layouts.py", devices=4, flags=[ROUND_AS_WRITTEN])
    first, wide = results.pop("one device"), results.pop("bfloat16")
    assert 1e-5 < abs(wide["loss"] / first["loss"] - 1) < 2e-3  # 8 bits were used, and are a rounding
    assert 0.05 < wide["distance"] < 0.2
    assert results["scanned"] == results["recomputed"] == first  # gradients too: their distance is 0
    for name, result in results.items():
        assert result["loss"] == pytest.approx(first["loss"], rel=1e-3), name
        assert result["grad_norm"] == pytest.approx(first["grad_norm"], rel=2e-2), name
        assert result["distance"] < 0.13, name


def refused(model, **sections):
    run = make_run(model, **sections)
    messages = check_run(run, {})
    try:
        check_layout(run, run.mesh)
    except UserError as error:
        messages.append(str(error))
    return "\n".join(messages)


LONG = {"train": {"seq_len": 32}}


def test_what_has_no_effect_or_does_not_fit_is_refused():
    assert refused(WIDE, **FLOAT8, **LONG) == ""
    assert refused({**GPT, "d_model": 64, "max_seq_len": 32}, **FLOAT8, **LONG, mesh={"tensor": 2}) == ""
    some = {"precision": {"compute": "bfloat16", "float8_products": "mlp"}}
    assert "Precision.float8_products = 'mlp' has no effect with Precision.compute = 'bfloat16'" in refused(
        WIDE, **some
    )
    assert "Model.d_model = 40 is no multiple of 16 on a device" in refused(
        {**WIDE, "d_model": 40, "head_dim": 16}, **FLOAT8, **LONG
    )
    split = refused({**WIDE, "d_ff": 48}, **FLOAT8, **LONG, mesh={"tensor": 2})
    assert "Model.d_ff = 48 over Mesh.tensor = 2 is no multiple of 16" in split
    assert "set Model.d_ff to 32 or 64" in split
    assert "Train.seq_len = 24 is no multiple of 16" in refused(WIDE, **FLOAT8, train={"seq_len": 24})
    assert "set Model.head_dim to 16" in refused({**WIDE, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}, **FLOAT8)
    routed = {**WIDE, "num_experts": 4, "experts_per_token": 2}
    mlp = {"precision": {"compute": "float8", "float8_products": "mlp"}}
    assert "leaves no product in 8 bits" in refused(routed, **mlp, **LONG)
    assert refused({**routed, "num_shared_experts": 1}, **mlp, **LONG) == ""


def test_peaks_are_those_of_8_bits():
    assert GPUS["H200"].peak_flops("float8") == 1979e12
    assert GPUS["A100-80"].peak_flops("float8") is None
