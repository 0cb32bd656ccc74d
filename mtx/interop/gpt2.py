"""GPT-2 as Hugging Face saves it. Its kernels are [inputs, outputs], as ours; query, key and value are one tensor."""

from __future__ import annotations

from typing import Any

from mtx.config import schema
from mtx.errors import UserError
from mtx.interop.config_json import get, refuse
from mtx.interop.tensors import Tensor

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
IGNORED = ("*.attn.bias", "*.attn.masked_bias")
"""Causal masks, which old files hold."""

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def read_model(config: dict[str, Any]) -> schema.Model:
    """The architecture of a config.json.

    Raises:
        UserError: It has a feature that we have not.
    """
    refuse(config, "scale_attn_weights", allowed=True)
    refuse(config, "scale_attn_by_inverse_layer_idx", allowed=False)
    refuse(config, "add_cross_attention", allowed=False)
    activation = get(config, "activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: activation_function {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    return schema.Model(
        vocab_size=get(config, "vocab_size", int),
        d_model=get(config, "n_embd", int),
        num_layers=get(config, "n_layer", int),
        num_heads=get(config, "n_head", int),
        d_ff=get(config, "n_inner", int, None),
        max_seq_len=get(config, "n_positions", int),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm="layernorm",
        norm_eps=get(config, "layer_norm_epsilon", float, 1e-5),
        position="learned",
        tie_embeddings=get(config, "tie_word_embeddings", bool, True),
        use_bias=True,
        init_std=get(config, "initializer_range", float, 0.02),
    )


def list_tensors(model: schema.Model) -> list[Tensor]:
    """Which tensor is which parameter."""

    def both(name: str, *modules: str) -> list[Tensor]:
        return [
            Tensor(name=f"transformer.h.{{layer}}.{name}.{kind}", params=tuple(f"layers/{m}/{kind}" for m in modules))
            for kind in ("weight", "bias")
        ]

    def norm(name: str, module: str) -> list[Tensor]:
        return [
            Tensor(name=f"transformer.{name}.weight", params=(f"{module}/gain",)),
            Tensor(name=f"transformer.{name}.bias", params=(f"{module}/bias",)),
        ]

    head, tied = "lm_head.weight", model.tie_embeddings
    return [
        Tensor(name="transformer.wte.weight", params=("embedding/table",), copy=head if tied else None),
        *([] if tied else [Tensor(name=head, params=("head/table",))]),
        Tensor(name="transformer.wpe.weight", params=("positions/table",)),
        *norm("h.{layer}.ln_1", "layers/attention_norm"),
        *both("attn.c_attn", "attention/query", "attention/key", "attention/value"),
        *both("attn.c_proj", "attention/output"),
        *norm("h.{layer}.ln_2", "layers/feedforward_norm"),
        *both("mlp.c_fc", "feedforward/up"),
        *both("mlp.c_proj", "feedforward/down"),
        *norm("ln_f", "final_norm"),
    ]
