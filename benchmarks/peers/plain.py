"""A decoder in plain PyTorch, GPT-2's or Llama's kind by shape: what one writes to be fast, and no more.

    x = embed(tokens) + positions
    for each layer:  x = x + attention(norm(x));  x = x + feedforward(norm(x))
    logits = norm(x) @ head^T

Queries, keys and values come of one product, as do gate and up of a gated MLP; attention is PyTorch's own
`scaled_dot_product_attention` with `is_causal`, so that it may choose its fastest kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention, with fewer key/value heads than query heads where the shape says so."""

    def __init__(self, shape: dict[str, Any]):
        super().__init__()
        self.heads, self.kv_heads, self.width = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = nn.Linear(shape["d_model"], rows, bias=shape["use_bias"])
        self.out = nn.Linear(self.heads * self.width, shape["d_model"], bias=shape["use_bias"])

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, D] -> the same."""
        batch, length, _ = x.shape
        parts = self.qkv(x).split([n * self.width for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k, v = (part.view(batch, length, -1, self.width).transpose(1, 2) for part in parts)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """The MLP, plain (GELU by tanh) or gated (SwiGLU)."""

    def __init__(self, shape: dict[str, Any]):
        super().__init__()
        self.gated = shape["activation"] == "swiglu"
        self.up = nn.Linear(shape["d_model"], shape["d_ff"] * (2 if self.gated else 1), bias=shape["use_bias"])
        self.down = nn.Linear(shape["d_ff"], shape["d_model"], bias=shape["use_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> the same."""
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down(F.silu(gate) * hidden)
        return self.down(F.gelu(hidden, approximate="tanh"))


class Layer(nn.Module):
    """Two residual branches."""

    def __init__(self, shape: dict[str, Any]):
        super().__init__()
        self.attention_norm, self.feedforward_norm = make_norm(shape), make_norm(shape)
        self.attention, self.feedforward = Attention(shape), FeedForward(shape)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, D] -> the same."""
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.feedforward(self.feedforward_norm(x))


class Decoder(nn.Module):
    """The whole model.

    Args:
        shape: `model` of `benchmarks/shapes.py`.
        recompute: Whether the backward pass computes each layer again.

    Raises:
        ValueError: The shape has a part that is not written here.
    """

    def __init__(self, shape: dict[str, Any], *, recompute: bool):
        super().__init__()
        kind = shape["position"], shape["activation"], shape["norm"]
        if kind not in (("learned", "gelu_tanh", "layernorm"), ("rotary", "swiglu", "rmsnorm")):
            raise ValueError(f"position, activation and norm {kind}: only GPT-2's and Llama's are written here")
        self.shape, self.recompute = shape, recompute
        self.embedding = nn.Embedding(shape["vocab_size"], shape["d_model"])
        learned = shape["position"] == "learned"
        self.positions = nn.Embedding(shape["max_seq_len"], shape["d_model"]) if learned else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_layers"]))
        self.norm = make_norm(shape)
        self.head = nn.Linear(shape["d_model"], shape["vocab_size"], bias=False)
        if shape["tie_embeddings"]:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                (nn.init.ones_ if "norm" in name and name.endswith("weight") else nn.init.zeros_)(parameter)
            else:
                is_last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=_STD / (2 * shape["num_layers"]) ** 0.5 if is_last else _STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]."""
        x, table = self.embedding(tokens), None
        if self.positions is None:
            table = make_rotary_table(self.shape, tokens.shape[1], x)
        else:
            x = x + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = checkpoint(layer, x, table, use_reentrant=False) if self.recompute else layer(x, table)
        return self.head(self.norm(x))


def make_norm(shape: dict[str, Any]) -> nn.Module:
    """LayerNorm or RMSNorm."""
    if shape["norm"] == "rmsnorm":
        return nn.RMSNorm(shape["d_model"], eps=shape["norm_eps"])
    return nn.LayerNorm(shape["d_model"], eps=shape["norm_eps"], bias=shape["use_bias"])


def make_rotary_table(shape: dict[str, Any], length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, H / 2], float32."""
    half = shape["head_dim"] // 2
    exponents = torch.arange(half, device=like.device, dtype=torch.float32) / half
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    angles = places[:, None] * shape["rope_theta"] ** -exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [B, N, T, H], halves paired, in float32."""
    (cos, sin), (a, b) = table, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
