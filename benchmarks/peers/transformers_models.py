"""Hugging Face's GPT-2 and Llama, as their own classes build them, without dropout and without a cache.

Their mask is left to `scaled_dot_product_attention`: with PyTorch before 2.14 transformers builds one under
`torch.compile`, and a mask keeps PyTorch from its flash kernel. So their own attention is registered under a second
name, for which no mask is made; without a mask it passes `is_causal`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_ATTENTION = "sdpa_without_mask"


class Transformers(nn.Module):
    """A model of the library that maps tokens to logits.

    Args:
        shape: `model` of `benchmarks/shapes.py`.
        recompute: Whether the backward pass computes each layer again.

    Raises:
        ValueError: Neither GPT-2 nor Llama is of this shape.
    """

    def __init__(self, shape: dict[str, Any], *, recompute: bool):
        super().__init__()
        AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
        self.model = AutoModelForCausalLM.from_config(
            make_config(shape), attn_implementation=_ATTENTION, dtype=torch.get_default_dtype()
        )
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]."""
        return self.model(input_ids=tokens).logits


def make_config(shape: dict[str, Any]) -> GPT2Config | LlamaConfig:
    """The library's config of a shape."""
    gpt2 = {
        "position": "learned", "activation": "gelu_tanh", "norm": "layernorm", "use_bias": True,
        "tie_embeddings": True, "num_kv_heads": shape["num_heads"], "head_dim": shape["d_model"] // shape["num_heads"],
    }  # fmt: skip
    llama = {"position": "rotary", "activation": "swiglu", "norm": "rmsnorm", "use_bias": False}
    common = {"vocab_size": shape["vocab_size"], "tie_word_embeddings": shape["tie_embeddings"], "use_cache": False}
    if all(shape[name] == value for name, value in gpt2.items()):
        return GPT2Config(
            n_positions=shape["max_seq_len"],
            n_embd=shape["d_model"],
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_inner=shape["d_ff"],
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=shape["norm_eps"],
            **common,
        )
    if all(shape[name] == value for name, value in llama.items()):
        return LlamaConfig(
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            max_position_embeddings=shape["max_seq_len"],
            rms_norm_eps=shape["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
            **common,
        )
    raise ValueError("neither GPT2Config nor LlamaConfig has this shape: see make_config")
