"""Model FLOPs against the closed formulas, and against published MFUs with their published step times."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mtx.config.schema import Model
from mtx.planning.flops import attention_flops_per_token, count_matmul_parameters, model_flops_per_token


def gpt(*, layers, width, heads, vocab=51200, seq_len=2048):
    model = Model(vocab_size=vocab, d_model=width, num_layers=layers, num_heads=heads, max_seq_len=seq_len)
    return model, *declare(model)


def declare(model):
    """Shapes and axes as a decoder of this architecture declares them."""
    layers, width, ff = model.num_layers, model.d_model, model.ff_width
    heads, kv_heads = model.num_heads * model.head_width, model.kv_heads * model.head_width
    leaves = {
        "embedding": ((model.vocab_size, width), ("vocab", "embed")),
        "layers": {
            "q": ((layers, width, heads), ("layers", "embed", "heads")),
            "k": ((layers, width, kv_heads), ("layers", "embed", "kv_heads")),
            "v": ((layers, width, kv_heads), ("layers", "embed", "kv_heads")),
            "o": ((layers, heads, width), ("layers", "heads", "embed")),
            "up": ((layers, width, ff), ("layers", "embed", "mlp")),
            "down": ((layers, ff, width), ("layers", "mlp", "embed")),
            "bias": ((layers, ff), ("layers", "mlp")),
            "gain": ((layers, width), ("layers", "embed")),
        },
        "gain": ((width,), ("embed",)),
    }
    if model.gated:
        leaves["layers"]["gate"] = leaves["layers"]["up"]
    if model.position == "learned":
        leaves["positions"] = ((model.max_seq_len, width), ("positions", "embed"))
    if not model.tie_embeddings:
        leaves["head"] = leaves["embedding"]

    def pick(tree, choose):
        return {k: pick(v, choose) if isinstance(v, dict) else choose(v) for k, v in tree.items()}

    return pick(leaves, lambda leaf: SimpleNamespace(shape=leaf[0])), pick(leaves, lambda leaf: leaf[1])


MT_NLG = {"layers": 105, "width": 20480, "heads": 128}
LLAMA3_8B = Model(
    vocab_size=128256, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14336, max_seq_len=8192,
    activation="swiglu", norm="rmsnorm", position="rotary", tie_embeddings=False, use_bias=False,
)  # fmt: skip


@pytest.mark.parametrize("shape", [MT_NLG, {"layers": 24, "width": 2304, "heads": 24}])
def test_full_attention_equals_the_formula_of_narayanan_et_al(shape):
    model, params, axes = gpt(**shape)
    l, h, s, v = shape["layers"], shape["width"], 2048, 51200  # noqa: E741
    per_sequence = 72 * s * l * h**2 * (1 + s / (6 * h) + v / (12 * l * h))
    assert s * model_flops_per_token(model, params, axes, s) == pytest.approx(per_sequence, rel=1e-12)


def test_causal_attention_is_half_of_full():
    model, params, axes = gpt(**MT_NLG)
    full, causal = (model_flops_per_token(model, params, axes, 2048, kind) for kind in ("full", "causal"))
    assert full - causal == 3 * 2 * 2048 * 20480 * 105
    assert attention_flops_per_token(model, 4096) == 2 * attention_flops_per_token(model, 2048)


def test_what_counts_as_multiplied():
    model, params, axes = gpt(layers=2, width=8, heads=2, vocab=32, seq_len=16)
    matrices = 2 * 12 * 8 * 8
    assert (
        count_matmul_parameters(model, params, axes) == matrices + 32 * 8
    )  # no bias, no gain, no position; the tied head
    untied = Model(vocab_size=32, d_model=8, num_layers=2, num_heads=2, max_seq_len=16, tie_embeddings=False)
    assert count_matmul_parameters(untied, *declare(untied)) == matrices + 32 * 8  # the head, not the embedding as well


def test_of_the_experts_a_tokens_own_count():
    model = replace(gpt(layers=2, width=8, heads=2, vocab=32)[0], num_experts=4, experts_per_token=1, expert_every=2)
    params, axes = declare(model)
    dense = count_matmul_parameters(model, params, axes)
    params["expert_layers"] = {"up": SimpleNamespace(shape=(1, 4, 8, 32)), "router": SimpleNamespace(shape=(1, 8, 4))}
    axes["expert_layers"] = {"up": ("layers", "experts", "embed", "mlp"), "router": ("layers", "embed", "router")}
    assert count_matmul_parameters(model, params, axes) == dense + 8 * 32 + 8 * 4


def test_mfu_of_published_runs():
    """Published seconds give the published MFU: the convention is the field's."""

    def mfu(flops_per_token, tokens, seconds, gpus, peak):
        return 100 * flops_per_token * tokens / (seconds * gpus * peak)

    model, params, axes = gpt(layers=48, width=6144, heads=64)
    korthikanti_22b = mfu(model_flops_per_token(model, params, axes, 2048), 4 * 2048, 1.10, 8, 312e12)
    assert korthikanti_22b == pytest.approx(41.5, abs=0.3)  # arXiv 2205.05198, table 5

    model, params, axes = gpt(layers=96, width=12288, heads=96)
    korthikanti_175b = mfu(model_flops_per_token(model, params, axes, 2048), 64 * 2048, 13.75, 64, 312e12)
    assert korthikanti_175b == pytest.approx(51.4, abs=0.2)

    tokens = 128 * 8192  # Llama 3.1 8B on 8 H100, NVIDIA's dgxc-benchmarking v25.04: 12.27 s, 62.5 %
    flops = model_flops_per_token(LLAMA3_8B, *declare(LLAMA3_8B), 8192)
    assert mfu(flops, tokens, 12.27, 8, 989e12) == pytest.approx(62.5, abs=0.1)
    causal = model_flops_per_token(LLAMA3_8B, *declare(LLAMA3_8B), 8192, "causal")
    assert mfu(causal, tokens, 12.27, 8, 989e12) == pytest.approx(55.6, abs=0.1)


def test_planning_facts_import_no_jax():
    program = "import mtx.planning.flops, mtx.planning.hardware, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
