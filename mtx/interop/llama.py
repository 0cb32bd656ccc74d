"""Llama, and Mistral without its window, as Hugging Face saves them: rotary positions, RMSNorm, a gated MLP."""

from __future__ import annotations

from typing import Any

from mtx.config import schema
from mtx.errors import UserError
from mtx.interop.config_json import get, refuse
from mtx.interop.tensors import Tensor

MODEL_TYPES = ("llama", "mistral")
PREFIX = "model."
IGNORED = ("*rotary_emb.inv_freq",)
"""Rotary frequencies, which old files hold; they follow from the config."""

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}


def read_model(config: dict[str, Any]) -> schema.Model:
    """The architecture of a config.json.

    Raises:
        UserError: It has a feature that we have not.
    """
    activation = get(config, "hidden_act", str, "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    use_bias = get(config, "attention_bias", bool, False)
    refuse(config, "mlp_bias", allowed=use_bias)
    longest = get(config, "max_position_embeddings", int)
    # A Mistral file that lacks a key means another value than a Llama file that does. null means none in both.
    mistral = config["model_type"] == "mistral"
    window = get({"sliding_window": 4096 if mistral else None, **config}, "sliding_window", int, None)
    if window is not None and window < longest:
        raise UserError(
            f"config.json: sliding_window {window} is shorter than max_position_embeddings {longest}; supported: none, "
            "or one that covers all positions (lower max_position_embeddings to the window for shorter texts)"
        )
    rope = _read_rope(config)
    return schema.Model(
        vocab_size=get(config, "vocab_size", int),
        d_model=get(config, "hidden_size", int),
        num_layers=get(config, "num_hidden_layers", int),
        num_heads=get(config, "num_attention_heads", int),
        num_kv_heads=get({"num_key_value_heads": 8 if mistral else None, **config}, "num_key_value_heads", int, None),
        head_dim=get(config, "head_dim", int, None),
        d_ff=get(config, "intermediate_size", int),
        max_seq_len=longest,
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm="rmsnorm",
        norm_eps=get(config, "rms_norm_eps", float, 1e-6),
        position="rotary",
        rope_theta=get(rope, "rope_theta", float, 10000.0),
        rope_scaling=_read_scaling(rope, longest),
        tie_embeddings=get(config, "tie_word_embeddings", bool, False),
        use_bias=use_bias,
        init_std=get(config, "initializer_range", float, 0.02),
    )


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What new files keep in `rope_parameters`, and old ones in `rope_theta` and `rope_scaling`."""
    new = get(config, "rope_parameters", dict, None)
    if new is not None:
        return new
    old = get(config, "rope_scaling", dict, None) or {}
    theta = get(config, "rope_theta", float, None)
    return old if theta is None else {**old, "rope_theta": theta}


def _read_scaling(rope: dict[str, Any], longest: int) -> schema.RopeScaling | None:
    refuse(rope, "partial_rotary_factor", allowed=1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"config.json: rope_type {kind!r}; supported: default, llama3")
    return schema.RopeScaling(
        factor=get(rope, "factor", float),
        low_frequency_factor=get(rope, "low_freq_factor", float),
        high_frequency_factor=get(rope, "high_freq_factor", float),
        original_max_seq_len=get(rope, "original_max_position_embeddings", int, longest),
    )


def list_tensors(model: schema.Model) -> list[Tensor]:
    """Which tensor is which parameter."""

    def linear(name: str, module: str) -> list[Tensor]:
        prefix = f"model.layers.{{layer}}.{name}"
        weight = Tensor(name=f"{prefix}.weight", params=(f"layers/{module}/weight",), transposed=True)
        bias = Tensor(name=f"{prefix}.bias", params=(f"layers/{module}/bias",))
        return [weight, bias] if model.use_bias else [weight]

    head, tied = "lm_head.weight", model.tie_embeddings
    return [
        Tensor(name="model.embed_tokens.weight", params=("embedding/table",), copy=head if tied else None),
        *([] if tied else [Tensor(name=head, params=("head/table",))]),
        Tensor(name="model.layers.{layer}.input_layernorm.weight", params=("layers/attention_norm/gain",)),
        *linear("self_attn.q_proj", "attention/query"),
        *linear("self_attn.k_proj", "attention/key"),
        *linear("self_attn.v_proj", "attention/value"),
        *linear("self_attn.o_proj", "attention/output"),
        Tensor(name="model.layers.{layer}.post_attention_layernorm.weight", params=("layers/feedforward_norm/gain",)),
        *linear("mlp.gate_proj", "feedforward/gate"),
        *linear("mlp.up_proj", "feedforward/up"),
        *linear("mlp.down_proj", "feedforward/down"),
        Tensor(name="model.norm.weight", params=("final_norm/gain",)),
    ]
