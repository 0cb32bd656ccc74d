"""Certificates: what is equal passes, a mistake is found where it is, a process that dies is a finding."""

import dataclasses
import json
import sys

import pytest
from programs import environment, run, run_json

from mtx.config import reader
from mtx.errors import UserError
from mtx.evaluation import isolation
from mtx.evaluation.certify import plan_certificate
from mtx.evaluation.covering import parse_layout

CONFIG = """
Model.vocab_size = 96
Model.d_model = 64
Model.num_layers = 6
Model.num_heads = 4
Model.max_seq_len = 64
Train.seq_len = 64
Train.global_batch_size = 8
Train.steps = 1
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def mistakes():
    return run_json("evaluation/broken_collectives.py", devices=2)


def test_what_is_equal_passes(mistakes):
    result = mistakes["none"]
    assert result["ok"]
    assert result["loss_error"] <= 1e-6
    assert 0 < result["gradient_error"] <= 1e-5
    assert result["departs_at"] is None
    assert result["departs_parameter"] is None


def test_a_sum_that_is_forgotten_is_found_in_its_layer(mistakes):
    result = mistakes["forward"]
    assert not result["ok"]
    assert result["loss_error"] > 1e-3
    assert result["gradient_error"] > 0.1
    assert result["departs_at"] == "layer 1"


def test_a_gradient_that_is_wrong_is_found_in_its_layer(mistakes):
    result = mistakes["backward"]
    assert not result["ok"]
    assert result["loss_error"] <= 1e-6  # the forward pass is right
    assert result["gradient_error"] > 0.1
    assert result["departs_at"] == "layer 1"
    assert result["departs_parameter"].startswith("layers.attention")


def test_what_is_wrong_everywhere_is_found_at_the_first_place(mistakes):
    result = mistakes["gradients"]
    assert not result["ok"]
    assert result["departs_at"] == "embedding or head"


def test_nan_is_no_agreement(mistakes):
    result = mistakes["nan"]
    assert not result["ok"]
    assert result["loss"] is None
    assert result["loss_error"] is None
    assert result["departs_at"] is not None  # NaN times zero is NaN: the place itself is lost


def test_command_compares_in_processes_of_their_own(config):
    process = run(
        ["-m", "mtx", "certify", str(config), "--layout", "tensor=2", "--json"], env=environment(), timeout_s=200
    )
    answer = json.loads(process.stdout)
    assert answer["ok"] is True
    (layout,) = answer["layouts"]
    assert layout["mesh"] == {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert {"loss", "loss_error", "gradient_error", "worst_parameter", "ok"} <= set(layout)
    assert layout["ok"] is True
    assert layout["loss_error"] <= 1e-6
    assert layout["gradient_error"] <= 1e-5
    assert "1/1 tensor=2: ok in" in process.stderr


def test_command_fails_where_a_collective_is_broken(config):
    program = (
        "import sys; from evaluation import broken_collectives as b; from mtx import cli, collectives\n"
        "collectives.Comm.reduce = b.forget_the_sum; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["certify", str(config), "--layout", "tensor=2", "--in-process", "--cpu-devices", "2", "--quiet"]
    process = run(["-c", program, *arguments], check=False, timeout_s=200)
    assert process.returncode == 1, process.stderr
    assert process.stderr == ""
    assert "tensor=2: departs first at " in process.stdout
    assert "1 of 1 layouts depart" in process.stdout


FAKE = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
if request["reference"] is None:
    (folder / "reference.npz").touch()
elif "Mesh.tensor = 2" in request["config"]:
    time.sleep(600)
elif "Mesh.fsdp = 2" in request["config"]:
    print("the last words", file=sys.stderr, flush=True)
    os.abort()
else:
    assert (pathlib.Path(request["reference"]) / "reference.npz").exists()
    (folder / "result.json").write_text(json.dumps({"mesh": {"data": 2}, "ok": True}))
"""


def certify(monkeypatch, program, *layouts, timeout_s=3.0, jobs=2):
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", program))
    whole = reader.load_text(CONFIG, "test").run
    plan = plan_certificate(whole, [parse_layout(text) for text in layouts], 8)
    return list(isolation.certify_apart(plan, lambda count: {}, timeout_s=timeout_s, jobs=jobs))


def test_hangs_and_crashes_are_findings_about_one_layout(monkeypatch):
    hung, crashed, good = certify(monkeypatch, FAKE, "tensor=2", "fsdp=2", "data=2")
    assert not hung.ok
    assert hung.failure == "hangs: killed after 3 s"
    assert hung.mesh["tensor"] == 2
    assert hung.seconds >= 3
    assert not crashed.ok
    assert crashed.failure == "crashed: the last words (signal 6)"
    assert crashed.loss is None
    assert good.ok


def test_without_a_reference_there_is_no_certificate(monkeypatch):
    with pytest.raises(UserError, match="raise --timeout-s"):
        certify(monkeypatch, "import time; time.sleep(600)", "data=2", timeout_s=0.3)
    with pytest.raises(RuntimeError, match="no such thing"):
        certify(monkeypatch, "import sys; sys.exit('no such thing')", "data=2")


def test_a_reduced_run_survives_the_way_to_its_process():
    plan = plan_certificate(reader.load_text(CONFIG + "Train.dropout = 0.1", "test").run, [parse_layout("data=2")], 8)
    placed = plan.place(plan.layouts[0])
    assert reader.load_text(isolation.describe(placed), "text").run == placed
    assert dataclasses.replace(placed, mesh=plan.reference.mesh) == plan.reference


@pytest.mark.slow
def test_default_layouts_agree(config):
    """On four devices: each axis alone and all pairs; three at once take eight."""
    arguments = ["-m", "mtx", "certify", str(config), "--json", "--cpu-devices", "4"]
    process = run(arguments, env=environment(), timeout_s=590, check=False)
    answer = json.loads(process.stdout)
    assert [layout for layout in answer["layouts"] if not layout["ok"]] == []
    assert process.returncode == 0
    for axis in ("pipe", "data", "fsdp", "context", "tensor"):
        assert any(layout["mesh"][axis] > 1 for layout in answer["layouts"])
