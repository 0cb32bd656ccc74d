"""The command, with a small model: what it measures, and what it records of a peer that cannot run."""

import json

import programs
import pytest

SUITE = """
steps = 2
warmup = 1
group = 1
[environment]
GLIBC_TUNABLES = "glibc.malloc.hugetlb=0"
[peers]
torch.arguments = ["plain"]
[[cases]]
name = "tiny"
config = "benchmarks/configs/gpt_4x256.gin"
overrides = ["Model.vocab_size = 64", "Model.d_model = 32", "Model.num_layers = 1", "Train.seq_len = 16"]
peers = ["torch"]
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "suite.toml").write_text(SUITE)
    command = ["benchmarks/compare.py", str(folder / "suite.toml"), "--rounds", "1", "--peer-python", "/no/such/python"]
    process = programs.run([*command, "--out", str(folder / "out.json")], check=False)
    return process, json.loads((folder / "out.json").read_text())


def test_mtx_is_measured(result):
    case = result[1]["cases"][0]
    (measured,) = [m for m in case["measurements"] if m["system"] == "mtx"]
    assert measured["tokens_per_second"] == 8 * 16 / measured["step_seconds"]["median"]
    assert measured["last_loss"] < measured["first_loss"]
    assert abs(measured["first_loss"] - 4.16) < 0.3  # ln 64
    assert 0 < measured["compile_seconds"] < measured["seconds_to_first_loss"] < measured["wall_seconds"] + 0.1
    assert 0 < measured["share_of_best_ceiling"] == measured["share_of_own_ceiling"] < 1
    assert 10e6 < measured["peak_memory_bytes"] < 8e9
    assert measured["mfu"] is None  # of a CPU nobody states a peak
    assert result[1]["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
    assert result[1]["versions"]["mtx"]["jax"]


def test_a_peer_that_cannot_run_is_recorded(result):
    process, document = result
    assert process.returncode == 1
    (failed,) = [m for m in document["cases"][0]["measurements"] if m["system"] == "torch"]
    assert "/no/such/python does not run" in failed["error"]
    assert "torch, round 1" in process.stdout
    assert "round 1, tiny, mtx" in process.stderr
