"""An independent decoder, as short as it can be: plain jnp, one device, whole logits. What the real one must equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtx.config import schema


def _norm(config: schema.Model, p: Any, x: jax.Array) -> jax.Array:
    if config.norm == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    else:
        y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return y * p["gain"] + p.get("bias", 0.0)


def _linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["weight"] + p.get("bias", 0.0)


def _rotate(config: schema.Model, x: jax.Array) -> jax.Array:
    half = config.head_width // 2
    angle = jnp.arange(x.shape[1])[:, None] / config.rope_theta ** (jnp.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)[None, :, None]  # pairs as complex numbers
    return jnp.concatenate([z.real, z.imag], -1)


def _attention(config: schema.Model, p: Any, x: jax.Array) -> jax.Array:
    batch, length = x.shape[:2]
    q, k, v = (_linear(p[n], x).reshape(batch, length, -1, config.head_width) for n in ("query", "key", "value"))
    if config.position == "rotary":
        q, k = _rotate(config, q), _rotate(config, k)
    k, v = (jnp.repeat(a, config.num_heads // config.kv_heads, axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(config.head_width)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    if config.position == "alibi":  # for powers of two
        scores -= 2.0 ** (-8 * (jnp.arange(config.num_heads) + 1) / config.num_heads)[:, None, None] * distance
    weights = jax.nn.softmax(jnp.where(distance < 0, -jnp.inf, scores), -1)
    return _linear(p["output"], jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(batch, length, -1))


def _feedforward(config: schema.Model, p: Any, x: jax.Array) -> jax.Array:
    act = {
        "gelu": lambda h: 0.5 * h * (1 + jax.lax.erf(h / jnp.sqrt(2.0))),
        "gelu_tanh": lambda h: 0.5 * h * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (h + 0.044715 * h**3))),
        "relu": lambda h: jnp.maximum(h, 0),
        "silu": lambda h: h / (1 + jnp.exp(-h)),
        "swiglu": lambda h: h / (1 + jnp.exp(-h)),
    }[config.activation]
    if "gate" in p:
        return _linear(p["down"], act(_linear(p["gate"], x)) * _linear(p["up"], x))
    return _linear(p["down"], act(_linear(p["up"], x)))


def reference_logits(config: schema.Model, params: Any, tokens: jax.Array) -> jax.Array:
    """float32 [B, T, V]."""
    x = params["embedding"]["table"][tokens]
    if config.position == "learned":
        x = x + params["positions"]["table"][: tokens.shape[1]]
    for i in range(config.num_layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        x = x + _attention(config, p["attention"], _norm(config, p["attention_norm"], x))
        x = x + _feedforward(config, p["feedforward"], _norm(config, p["feedforward_norm"], x))
    head = params["head" if "head" in params else "embedding"]["table"]
    return _norm(config, params["final_norm"], x) @ head.T


def reference_loss(config: schema.Model, params: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean cross entropy of the next token, nats."""
    log_p = jax.nn.log_softmax(reference_logits(config, params, tokens[:, :-1]))
    return -(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0] * weights).sum() / weights.sum()
