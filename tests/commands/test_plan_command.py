"""`mtx plan`: what it answers, what it refuses, and that its three forms say the same."""

import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtx.cli import main
from mtx.planning.calibration import Calibration, write_calibration
from mtx.planning.constants import load_constants
from mtx.planning.hardware import GPUS
from mtx.planning.published import COLUMNS

FLAGSHIP = "configs/runs/mt_nlg_530b.gin"
SMALL = """
Model.vocab_size = 8192
Model.d_model = 1024
Model.num_layers = 4
Model.num_heads = 8
Model.max_seq_len = 1024
Precision.compute = 'bfloat16'
Train.tokens = 1_000_000_000
Train.seq_len = 1024
Train.global_batch_size = 256
Cluster.gpu = 'H100'
Cluster.gpus = 8
Cluster.gpu_hour_price = 2.5
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(SMALL)
    return str(path)


def ask(capsys, *arguments):
    """The answer as JSON."""
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complain(capsys, *arguments):
    """The message of a refusal."""
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mtx: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_the_config_says_which_machines(capsys, config):
    found = ask(capsys, config)
    assert (found["gpu"], found["gpus"], found["gpu_hour_price"]) == ("H100", 8, 2.5)
    assert found["tokens"] == pytest.approx(1e9, abs=256 * 1024)
    assert found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    other = ask(capsys, config, "--gpu", "A100-80", "--gpus", "4", "--price", "1", "--tokens", "2B")
    assert (other["gpu"], other["gpus"], other["cost"]) == ("A100-80", 4, other["gpu_hours"])
    assert other["tokens"] == pytest.approx(2e9, abs=256 * 1024)
    assert other["step_seconds"] > found["step_seconds"]


def test_terminal_and_json_say_the_same(capsys, config):
    found = ask(capsys, config)
    assert main(["plan", config]) == 0
    text = capsys.readouterr().out
    for shown in (
        f"{found['parameters']:,} parameters",
        f"{found['tokens_per_second']:,.0f} tokens/s",
        f"{found['mfu']:.1%}",
        f"{found['hfu']:.1%}",
        f"of {found['peak_tflops']:g}",
        f"{found['days']:.2f} days",
        f"cost {found['cost']:,.0f}",
        "has not been timed on GPUs",
    ):
        assert shown in text


def test_the_network_can_be_slower(capsys, config):
    layout = ["--gpus", "32", "--set", "Cluster.nvlink_domain = 8"]
    base, slow = ask(capsys, config, *layout), ask(capsys, config, *layout, "--network", "0.25")
    assert slow["step_seconds"] > base["step_seconds"]
    named = ask(capsys, config, *layout, "--set", "Cluster.nic_gbps = 100.0")
    assert named["step_seconds"] == slow["step_seconds"]


def test_the_search_answers_with_lines_that_can_be_pasted(capsys, config):
    found = ask(capsys, config, "--search", "--set", "Mesh.tensor = 8")
    search = found["search"]
    assert search["ranked"][0]["step_seconds"] == found["step_seconds"]
    assert search["rejected"]
    settings = [part for line in search["lines"] for part in ("--set", line)]
    assert ask(capsys, config, *settings)["step_seconds"] == found["step_seconds"]
    assert found["step_seconds"] < ask(capsys, config, "--set", "Mesh.tensor = 8")["step_seconds"]
    assert main(["plan", config, "--search"]) == 0
    text = capsys.readouterr().out
    assert "tensor leaves NVLink" not in text  # 8 GPUs have one domain
    assert "layouts that fit" in text


def test_days_and_budgets(capsys, config):
    days = ask(capsys, config)["days"]
    assert ask(capsys, config, "--days", str(days))["within_days"]["tokens"] == pytest.approx(1e9, rel=0.01)
    found = ask(capsys, config, "--search", "--days", str(days / 1.7), "--quiet")
    assert found["gpus"] > 8
    assert found["days"] <= days / 1.7
    assert [point["gpus"] for point in found["sizing"] if point["chosen"]] == [found["gpus"]]
    budget = found["cost"]
    found = ask(capsys, config, "--search", "--budget", str(1.001 * budget), "--quiet")
    assert found["cost"] <= 1.001 * budget
    assert found["gpus"] >= 8


def test_the_compute_optimal_size_needs_no_config(capsys):
    template = ["--set", "Train.global_batch_size = 32"]
    found = ask(capsys, "--compute-optimal", "--gpu", "H100", "--gpus", "8", "--days", "1", *template)
    optimal = found["compute_optimal"]
    assert found["days"] == pytest.approx(1, rel=0.01)
    assert optimal["active_parameters"] == found["active_parameters"]
    assert "2404.10102" in optimal["law"]["source"]


def test_the_table_of_gpus(capsys):
    assert main(["plan", "--list-gpus"]) == 0
    assert "GB200" in capsys.readouterr().out
    assert {"H100", "A100-40"} < {gpu["name"] for gpu in ask(capsys, "--list-gpus")["gpus"]}


def test_published_runs_are_predicted(capsys, tmp_path):
    row = dict.fromkeys(COLUMNS, "") | {
        "id": "made", "source": "s", "source_seen": "yes", "hardware": "A100-SXM-80GB", "precision": "bf16",
        "layers": "8", "hidden": "1024", "heads": "16", "vocab": "51200", "seq_len": "1024", "tp": "1", "pp": "1",
        "dp": "8", "micro_batch": "4", "global_batch": "32", "num_gpus": "8", "sec_per_iter": "0.5",
    }  # fmt: skip
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row, row | {"id": "unknown", "hardware": "TPUv9"}])
    found = ask(capsys, "--runs", str(path))
    made, unknown = found["runs"]
    assert made["time_error"] == pytest.approx(made["step_seconds"] / 0.5 - 1)
    assert found["summary"]["time"]["count"] == 1
    assert found["summary"]["time"]["median"] == pytest.approx(abs(made["time_error"]))
    assert unknown["step_seconds"] is None
    assert "TPUv9" in unknown["skipped"]
    assert main(["plan", "--runs", str(path)]) == 0
    assert "made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "Cluster.gpu = None"), "which GPU? Give --gpu NAME, or Cluster.gpu"),
        (("--gpu", "H9000"), "no GPU 'H9000' in the table; there are V100"),
        (("--gpu", "H100", "--set", "Cluster.gpus = None"), "how many GPUs? Give --gpus N"),
        (("--gpu", "H100", "--gpus", "2000"), "takes 280 GPUs at a time ... give 1960 or 2240 GPUs"),
        (("--gpu", "H100", "--gpus", "2240", "--set", "Mesh.data = 4"), "takes 1120 GPUs, and 2240 are given"),
        (("--gpu", "H100", "--gpus", "2240", "--software", "abacus"), "--software abacus: there are mtx"),
        (("--gpu", "H100", "--gpus", "2240", "--budget", "5"), "give it with --search"),
        (("--gpu", "H100", "--gpus", "8", "--search", "--days", "5"), "one of --gpus, --days and --budget"),
        (("--gpu", "H100", "--search", "--budget", "5"), "give --price"),
        (("--gpu", "V100", "--gpus", "1", "--search"), "no layout fits ... the closest"),
        (("--gpu", "H100", "--gpus", "8", "--compute-optimal"), "give --days"),
        (("--tokens", "many"), "expected a number above 0"),
        (("--price", "0"), "expected a number above 0"),
        (("--set", "Cluster.nic_gbps = 0"), "Cluster.nic_gbps must be a number >= 0.001"),
        (("--runs", "none.csv"), "none.csv: No such file"),
        (("--runs", "runs.csv", "--html", "plan.html"), "--runs makes nothing of --html"),
        (("--compute-optimal", "--days", "3", "--search"), "--compute-optimal makes nothing of --search"),
    ],
)
def test_what_is_refused_is_explained(capsys, arguments, said):
    message = complain(capsys, FLAGSHIP, *arguments)
    assert all(part in message for part in said.split(" ... "))


def test_a_mesh_names_the_number_of_gpus(capsys, config):
    named = ["--set", "Cluster.gpus = None", "--set", "Mesh.data = 2", "--set", "Mesh.tensor = 2"]
    assert ask(capsys, config, *named)["gpus"] == 4


def test_pages_replace_pages_of_plans_only(capsys, config, tmp_path):
    page = tmp_path / "plan.html"
    for _ in range(2):
        assert main(["plan", config, "--html", str(page)]) == 0
    capsys.readouterr()
    text = page.read_text()
    assert "<h2>Memory per GPU</h2>" in text
    page.write_text("my notes")
    assert "left alone" in complain(capsys, config, "--html", str(page))
    assert page.read_text() == "my notes"
    assert "no folder" in complain(capsys, config, "--html", str(tmp_path / "none" / "plan.html"))


def test_a_page_that_cannot_be_written_is_a_mistake(capsys, config, tmp_path):
    too_long = tmp_path / ("p" * 250 + ".html")  # the name of its draft is longer than file systems take
    assert "File name too long" in complain(capsys, config, "--html", str(too_long))


def test_help_is_quick_and_starts_nothing_heavy():
    program = (
        "import sys; from mtx.cli import main; main(['plan', '--help']); "
        "print(*{'jax', 'numpy', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert time.perf_counter() - begin < 3  # 0.1 s on a machine that does nothing else
    assert done.stderr.split() == []
    assert "--compute-optimal" in done.stdout
    assert Path(FLAGSHIP).exists()


def test_a_calibration_changes_the_constants_and_what_is_said(capsys, config, tmp_path):
    path = tmp_path / "mine.json"
    slow = dataclasses.replace(load_constants(), matmul_efficiency=0.5 * load_constants().matmul_efficiency)
    write_calibration(path, Calibration(gpu=None, constants=slow))
    base, mine = ask(capsys, config), ask(capsys, config, "--calibration", str(path))
    assert mine["step_seconds"] > 1.1 * base["step_seconds"]
    assert (base["calibrated"], mine["calibrated"]) == (False, True)
    assert mine["expected_error"] is None
    assert "your own machine" in mine["trust"]


def test_a_calibration_of_other_devices_is_refused(capsys, config, tmp_path):
    path = tmp_path / "mine.json"
    own = dataclasses.replace(GPUS["H200"], name="my cluster")
    write_calibration(path, Calibration(gpu=own, constants=load_constants()))
    message = complain(capsys, config, "--calibration", str(path))
    assert "is of my cluster, and says nothing about H100" in message
    assert ask(capsys, config, "--calibration", str(path), "--gpu", "my cluster")["gpu"] == "my cluster"
