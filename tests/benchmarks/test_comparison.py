"""Ratios, shares and faults of measurements that are written here, and the page that shows them."""

import json
import subprocess
import sys

import comparison
import page
import pytest
import suites
import sweep
from programs import ROOT

CASE = {
    "batch": 4, "seq_len": 8, "parameters": 100, "matmul_parameters": 90, "compute": "bfloat16",
    "flops_per_step": {"full": 4e12, "causal": 3e12},
}  # fmt: skip


def measured(seconds, ceiling=10.0, **more):
    return {
        "parameters": 100,
        "step_seconds": {"min": seconds, "median": seconds, "max": seconds},
        "matmul_tflops_per_device": {"median": ceiling, "max": ceiling},
        "peak_device_bytes": None,
        "peak_resident_bytes": 2**30,
        "compile_seconds": 1.0,
        "seconds_to_first_step": 2.0,
        "first_loss": 10.8,
        "last_loss": 10.5,
        "steps": 3,
        "group": 1,
        **more,
    }


def record(system, turn, seconds, **more):
    derived = comparison.derive(measured(seconds, **more), CASE, peak=20e12)
    return {"system": system, "round": turn, "load_per_core": 0.5, **derived}


def test_a_measurement_is_derived_from_the_common_work():
    found = comparison.derive(measured(0.5), CASE, peak=20e12)
    assert found["tokens_per_second"] == 64
    assert found["model_tflops"] == {"full": 8.0, "causal": 6.0}
    assert found["mfu"] == {"full": 0.4, "causal": 0.3}
    assert found["share_of_own_ceiling"] == 0.8
    assert found["peak_memory_kind"] == "resident"
    assert comparison.derive(measured(0.5, peak_device_bytes=7), CASE, None)["peak_memory_bytes"] == 7


@pytest.mark.parametrize("name", ["parameters", "matmul_parameters"])
def test_unequal_work_is_no_comparison(name):
    with pytest.raises(ValueError, match=f"unequal work: {name} is 99 here"):
        comparison.derive(measured(0.5, **{name: 99}), CASE, None)


def test_shares_are_of_the_best_ceiling_of_the_round():
    found = [record("mtx", 1, 1.0), record("torch", 1, 1.0, ceiling=20.0), record("mtx", 2, 1.0)]
    comparison.share_ceilings(found)
    assert [m["share_of_own_ceiling"] for m in found] == [0.4, 0.2, 0.4]
    assert [m["share_of_best_ceiling"] for m in found] == [0.2, 0.2, 0.4]


def test_ratios_are_of_pairs_of_one_round():
    found = [record("mtx", 1, 1.0), record("torch", 1, 2.0), record("mtx", 2, 4.0), record("torch", 2, 4.0)]
    found += [record("mtx", 3, 1.0), {"system": "torch", "round": 3, "error": "out\nof memory"}]
    found += [record("slow", 1, 9.0)]
    comparison.share_ceilings(found)
    summary = comparison.summarize(found, ["mtx", "torch", "slow", "absent"])
    assert summary["ratios"]["torch"] == {"median": 1.5, "low": 1.0, "high": 2.0, "pairs": 2}
    assert summary["best_peer"] == "torch"
    assert set(summary["systems"]) == {"mtx", "torch", "slow"}
    assert summary["faults"] == ["torch, round 3: of memory"]


def test_a_busy_machine_is_told():
    found = [record("mtx", 1, 1.0), {**record("torch", 1, 1.0), "load_per_core": 2.5}]
    assert list(comparison.find_faults(found)) == ["torch, round 1: the machine was busy, with a load of 2.5 per core"]


@pytest.mark.parametrize(
    ("losses", "fault"),
    [
        ({"first_loss": 11.2}, "the first loss is 11.200"),
        ({"first_loss": float("nan")}, "the first loss is nan"),
        ({"last_loss": 10.9}, "the loss went from 10.800 to 10.900"),
        ({"last_loss": float("nan")}, "the loss went from 10.800 to nan"),
    ],
)
def test_a_system_that_does_not_learn_is_told(losses, fault):
    found = [record("mtx", 1, 1.0), record("other", 1, 1.0), record("torch", 1, 1.0, **losses)]
    assert any(text.startswith("torch, round 1: ") and fault in text for text in comparison.find_faults(found))


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_suites_name_what_is_there(name):
    suite = suites.read_suite(name)
    assert len({case.name for case in suite.cases}) == len(suite.cases) > 2
    assert {peer for case in suite.cases for peer in case.peers} == set(suite.peers)


def test_a_suite_with_a_mistake_is_refused(tmp_path):
    path = tmp_path / "suite.toml"
    begin = 'steps = 1\nwarmup = 1\ngroup = 1\n[[cases]]\nname = "a"\nconfig = '
    for text, message in (
        (f'{begin}"no.gin"', "there is no no.gin"),
        (f'{begin}"configs/models/gpt2_small.gin"\npeers = ["torch"]', "unknown peers torch"),
        (f'colour = 1\n{begin}"configs/models/gpt2_small.gin"', "colour"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            suites.read_suite(str(path))
    with pytest.raises(ValueError, match="no peer jax; there is torch_compile"):
        suites.choose_cases(suites.read_suite("cpu"), [], ["jax"])


def test_options_are_combined():
    found = sweep.combine(["Train.recompute='none'|'full'", "XLA_FLAGS=|--a=1"])
    assert [tuple(point.values()) for point in found] == [
        ("'none'", ""), ("'none'", "--a=1"), ("'full'", ""), ("'full'", "--a=1"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="each name once"):
        sweep.combine(["a=1", "a=2"])


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "there.json"
    out.write_text("{}")
    for script in (["compare.py", "cpu"], ["sweep.py", "x.gin", "--over", "A.b=1"]):
        command = [sys.executable, f"benchmarks/{script[0]}", *script[1:], "--out", str(out)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 2
        assert "never overwritten" in process.stderr
    assert out.read_text() == "{}"


def test_page_shows_what_was_measured_and_what_failed():
    found = [record("mtx", 1, 1.0), record("torch", 1, 1.5), {"system": "torch", "round": 2, "error": "<no memory>"}]
    comparison.share_ceilings(found)
    systems = ["mtx", "torch"]
    document = {
        "suite": "h200", "command": "compare.py", "environment": {}, "git_revision": None,
        "date": "2026-01-01T00:00:00",
        "machine": {"processor": "a", "cores": 2, "device": "NVIDIA H200", "gpu": None},
        "versions": {"mtx": {"jax": "1"}, "peers": None},
        "cases": [{
            "name": "gpt", "config": "gpt.gin", "overrides": [], "work": CASE, "systems": systems,
            "peer_arguments": {"torch": ["plain"]}, "measurements": found,
            "summary": comparison.summarize(found, systems),
        }],
    }  # fmt: skip
    text = page.render([json.loads(json.dumps(document))])
    for expected in ("1.50x", "MFU 20.0% (causal 15.0%)", "&lt;no memory&gt;", "compare.py", "NVIDIA H200"):
        assert expected in text
    assert "<no memory>" not in text
    document["cases"][0]["summary"] = comparison.summarize([], systems)
    assert "Each measurement" not in page.render([document])
