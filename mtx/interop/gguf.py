"""GGUF files of the Llama architecture, quantised ones too, shown as the Hugging Face folder they were made from.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All numbers are little-endian; dims are listed from
the innermost; a quantised row is a chain of blocks of 32 numbers with a float16 scale. The rows of the query and key
matrices are in another order than Hugging Face's: neighbours turn together under rotary positions, not halves.

The tokenizer inside is not read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mtx.errors import UserError
from mtx.interop.tensors import Slices

BLOCK = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
_Q4_1 = np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", BLOCK // 2)])
_Q8_0 = np.dtype([("scale", "<f2"), ("bytes", "i1", BLOCK)])
_QUANTISED = {3: _Q4_1, 8: _Q8_0}
_SUPPORTED = "F32, F16, BF16, Q4_1, Q8_0"

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Reads a header from the front. Raises struct.error beyond the end."""

    def __init__(self, data: np.ndarray):
        self._data, self.place = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data.data, self.place)
        self.place += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self._data) - self.place:
            raise struct.error("a string reaches beyond the file")
        self.place += length
        return bytes(self._data[self.place - length : self.place]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"a value of unknown kind {kind}")
        return self.number(_SCALARS[kind])


class GgufFile:
    """The config and the tensors of a file, under the names that Hugging Face gives them."""

    def __init__(self, place: Path):
        """Raises: UserError: It is no GGUF file, damaged, of another architecture or quantised in another way."""
        self.place = place
        self._data = np.memmap(place, np.uint8, mode="r") if place.stat().st_size else np.zeros(0, np.uint8)
        if bytes(self._data[:4]) != b"GGUF":
            raise UserError(f"{place}: no GGUF file; give a folder with config.json, or a .gguf file")
        try:
            self._metadata, self._entries = self._read_header(_Cursor(self._data[4:]))
        except (struct.error, UnicodeDecodeError) as error:
            raise UserError(f"{place}: damaged: {error}") from None
        for name, entry in self._entries.items():
            if entry.kind not in _PLAIN and entry.kind not in _QUANTISED:
                raise UserError(f"{place}: {name} has the type {entry.kind}; supported: {_SUPPORTED}")
            cut = entry.kind in _QUANTISED and entry.shape[-1] % BLOCK != 0
            if cut or entry.offset + _nbytes(entry) > len(self._data):
                raise UserError(f"{place}: damaged: {name} {list(entry.shape)} does not fit the file")
        self._read_whole = lru_cache(maxsize=1)(self._decode)  # consecutive reads are of parts of one tensor

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _read_header(self, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
        version, num_tensors, num_values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in (2, 3):
            raise UserError(f"{self.place}: GGUF version {version}; supported: 2, 3")
        metadata = {}
        for _ in range(num_values):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        found = []
        for _ in range(num_tensors):
            name = cursor.string()
            dims = [cursor.number("Q") for _ in range(cursor.number("I"))]
            found.append((_rename(name), tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")))
        alignment = metadata.get("general.alignment", BLOCK)
        first = -(-(cursor.place + 4) // alignment) * alignment
        return metadata, {name: _Entry(shape, kind, first + offset) for name, shape, kind, offset in found}

    @cached_property
    def config(self) -> dict[str, Any]:
        """As the config.json of the folder that the file was made from has it."""
        architecture = self._metadata.get("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.place}: the architecture {architecture!r}; supported in GGUF files: 'llama'")

        def get(key: str, default: Any = None) -> Any:
            value = self._metadata.get(f"llama.{key}", default)
            if value is None:
                raise UserError(f"{self.place}: llama.{key} is missing")
            return value

        heads = get("attention.head_count")
        head_dim = get("attention.key_length", get("embedding_length") // heads)
        embedding = self.shapes.get("model.embed_tokens.weight")
        if not embedding:
            raise UserError(f"{self.place}: token_embd.weight is missing")
        scaling = self._metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise UserError(f"{self.place}: llama.rope.scaling.type {scaling!r}; supported: 'none'")
        if get("rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.place}: only a part of each head is rotated; supported: all of it")
        return {
            "model_type": "llama",
            "vocab_size": embedding[0],
            "hidden_size": get("embedding_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": get("feed_forward_length"),
            "max_position_embeddings": get("context_length"),
            # It was a short decimal before it was stored as float32: 1e-5, not 9.999999747e-06.
            "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
            "rope_theta": get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A part of a tensor, float32 where it is quantised."""
        return self._read_whole(name)[slices]

    def _decode(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        raw = self._data[entry.offset : entry.offset + _nbytes(entry)]
        if entry.kind in _PLAIN:
            values = raw.view(_PLAIN[entry.kind])
        elif _QUANTISED[entry.kind] is _Q4_1:
            blocks = raw.view(_Q4_1)
            # The low halves of the bytes are the first 16 numbers of the block, the high halves the others.
            levels = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
            values = levels * _column(blocks["scale"]) + _column(blocks["least"])
        else:
            blocks = raw.view(_Q8_0)
            values = blocks["bytes"] * _column(blocks["scale"])
        values = values.reshape(entry.shape)
        for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{kind}." in name:
                pairs = values.reshape(self.config[heads], -1, 2, *entry.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(entry.shape)
        return values


def _rename(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return _NAMES.get(name, name)
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}.{match[3]}"


def _nbytes(entry: _Entry) -> int:
    count = math.prod(entry.shape)
    if entry.kind in _PLAIN:
        return count * _PLAIN[entry.kind].itemsize
    return count // BLOCK * _QUANTISED[entry.kind].itemsize


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None]
