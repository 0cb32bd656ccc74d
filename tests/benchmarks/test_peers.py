"""The peers do mtx's work: equal parameters of equal kinds, and as many FLOPs as mtx counts.

Needs an interpreter with torch and transformers: this one, or the one that PEER_PYTHON names.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import shapes
from programs import ROOT

CONFIGS = {
    "gpt": ["benchmarks/configs/gpt_4x256.gin"],
    "llama": ["configs/models/llama3_8b.gin", "Train.steps = 1", "Train.seq_len = 64", "Train.global_batch_size = 2"],
}
SMALL = ["Model.vocab_size = 96", "Model.d_model = 32", "Model.num_layers = 2", "Model.num_heads = 4"]
SMALL_LLAMA = [*SMALL, "Model.num_kv_heads = 2", "Model.d_ff = 48"]
_FLOPS = """
import argparse, json, sys
from pathlib import Path
sys.path.insert(0, "benchmarks/peers")
import torch, train
from torch.utils.flop_counter import FlopCounterMode
case = json.loads(Path(sys.argv[2]).read_text())
args = argparse.Namespace(
    kind=sys.argv[1], params=None, recompute=False, compile=False, mode=None, microbatch=None, activation_budget=None
)
with train.choose_kernel("math"), FlopCounterMode(display=False) as counter:
    trainer = train.Trainer(case, args, torch.device("cpu"))
    losses = [float(trainer.step()) for _ in range(2)]
print(json.dumps({"flops": counter.get_total_flops() / 2, "losses": losses}))
"""


@functools.cache
def find_peer_python():
    """An interpreter that has torch and transformers; None without one."""
    if named := os.environ.get("PEER_PYTHON"):
        return named
    return sys.executable if all(importlib.util.find_spec(name) for name in ("torch", "transformers")) else None


def run_peer(*arguments):
    if find_peer_python() is None:
        pytest.skip("no torch and transformers here: name an interpreter that has them in PEER_PYTHON")
    process = subprocess.run([find_peer_python(), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture
def write_case(tmp_path):
    def write(path, overrides):
        case = shapes.describe_case(str(ROOT / path), overrides)
        (tmp_path / "case.json").write_text(json.dumps(case))
        return case, str(tmp_path / "case.json")

    return write


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["plain", "transformers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peers_count_the_parameters_that_mtx_counts(name, kind, write_case):
    path, *overrides = CONFIGS[name]
    case, file = write_case(path, overrides)
    counts = run_peer("benchmarks/peers/train.py", kind, file, "--count")
    assert counts == {"parameters": case["parameters"], "matmul_parameters": case["matmul_parameters"]}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["plain", "transformers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peers_do_the_flops_that_mtx_counts(name, kind, write_case):
    path, *overrides = CONFIGS[name]
    case, file = write_case(path, [*overrides, *(SMALL_LLAMA if name == "llama" else SMALL)])
    found = run_peer("-c", _FLOPS, kind, file)
    assert found["flops"] == pytest.approx(case["flops_per_step"]["full"], rel=1e-3)
    assert found["losses"][0] == pytest.approx(4.56, abs=0.2)  # ln 96
    assert found["losses"][1] < found["losses"][0]


def test_work_that_no_peer_does_is_refused():
    from mtx.errors import UserError

    with pytest.raises(UserError, match="dropout > 0"):
        shapes.describe_case(str(ROOT / "benchmarks/configs/gpt_4x256.gin"), ["Train.dropout = 0.1"])
