"""`mtx study` from the command line, on two simulated devices."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from programs import ROOT, run

STUDY = """
include 'FOLDER/run.gin'
Study.simulated = True
Study.steps = 3
Study.warmup_steps = 1
Study.minutes = 2.0
Study.layouts = {
    'data': {'Mesh.data': 2},
    'broken': {'Mesh.data': 2, 'Data.train': {'no/such/store': 1.0}},
    'tensor': {'Mesh.data': 1, 'Mesh.tensor': 2},
    'misfit': {'Mesh.data': 1, 'Mesh.tensor': 3},
}
"""


@pytest.fixture
def study(workplace, tmp_path):
    path = tmp_path / "small.gin"
    path.write_text(STUDY.replace("FOLDER", str(workplace.folder)))
    return path


def command(study, *options):
    return ["-m", "mtx", "study", str(study), "--out", str(study.parent / "out"), *options]


def play(workplace, study, *options, check=True):
    process = run(command(study, *options), env=workplace.environment(), timeout_s=400, check=check)
    assert "Traceback" not in process.stderr, process.stderr
    return process


def lines(study):
    path = study.parent / "out/study.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_study_goes_on_after_a_kill_and_recalibrates(workplace, study):
    process = subprocess.Popen(
        [sys.executable, *command(study)], env=workplace.environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not lines(study):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (first,) = lines(study)

    done = play(workplace, study, "--json", "--calibrate", str(study.parent / "cpu.json"))
    document = json.loads(done.stdout)
    assert lines(study)[0] == first
    assert len(lines(study)) == 3
    assert [row["status"] for row in document["points"]] == ["measured", "failed", "measured", "failed"]
    assert [row["failure"] for row in document["points"]] == [None, "crash", None, "misfit"]
    assert "no/such/store" in document["points"][1]["reason"]
    assert "point 1 of 2: broken" in done.stderr
    assert "2 of 4 points failed" in done.stderr
    for row in (document["points"][0], document["points"][2]):
        assert row["simulated"]
        assert row["devices"] == 2
        assert row["measured"]["steps"] == 3
        assert row["measured"]["memory_kind"] == "compiler"
        assert row["measured"]["step_seconds"] > 0
        run_dir = study.parent / "out" / row["run_dir"]
        assert (run_dir / "metrics.jsonl").exists()
        assert not (run_dir / "checkpoints").exists()
    written = json.loads((study.parent / "out/study.json").read_text())
    assert written == document
    assert "simulated" in (study.parent / "out/study.html").read_text()
    calibration = document["calibration"]
    assert calibration["points"] == 2
    assert calibration["median_error_after"] <= calibration["median_error_before"]

    again = play(workplace, study)
    assert len(lines(study)) == 3
    assert "point 1" not in again.stderr
    assert "simulated" in again.stdout
    refused = play(workplace, study, "--calibrate", str(study.parent / "cpu.json"), check=False)
    assert (refused.returncode, "exists already" in refused.stderr) == (2, True)


def test_mistakes_cost_nothing(workplace, study):
    study.write_text(study.read_text().replace("Mesh.tensor", "Mesh.tensr"))
    done = play(workplace, study, check=False)
    assert done.returncode == 2
    assert "small.gin:7: Mesh has no field 'tensr'; did you mean tensor?" in done.stderr
    assert not (study.parent / "out").exists()
    lost = play(workplace, study.parent / "smal.gin", check=False)
    assert (lost.returncode, "small.gin" in lost.stderr) == (2, True)


def test_folders_of_other_things_are_left_alone(workplace, study):
    page = study.parent / "out" / "study.html"
    page.parent.mkdir()
    page.write_text("my notes")
    refused = play(workplace, study, check=False)
    assert (refused.returncode, "has other files" in refused.stderr) == (2, True)
    assert [path.name for path in page.parent.iterdir()] == ["study.html"]
    assert page.read_text() == "my notes"


def test_dry_run_for_gpus_that_are_not_here(workplace, study):
    settings = ["Study.simulated = False", "Cluster.gpu = 'H100'", "Data.train = {'no/such/store': 1.0}"]
    done = play(workplace, study, "--dry-run", "--json", *(word for s in settings for word in ("--set", s)))
    document = json.loads(done.stdout)
    assert [row["status"] for row in document["points"]] == ["waiting"] * 3 + ["failed"]
    assert all(row["plan"]["step_seconds"] > 0 for row in document["points"][:3])
    assert not (study.parent / "out").exists()
    text = play(workplace, study, "--dry-run", *(word for s in settings for word in ("--set", s))).stdout
    assert "planned step" in text
    assert "misfit: misfit: " in text


@pytest.mark.slow
def test_points_of_several_processes(workplace, study):
    study.write_text(study.read_text().replace("simulated = True", "simulated = False"))
    launch = ("--launch", "local --processes 2", "--devices", "2")
    sets = ("--set", "Study.points = [('as it is', 'data'), ('as it is', 'broken')]")
    document = json.loads(play(workplace, study, "--json", *launch, *sets).stdout)
    good, broken = document["points"]
    assert (good["status"], good["devices"], good["simulated"], good["measured"]["steps"]) == ("measured", 2, False, 3)
    assert (broken["failure"], "no/such/store" in broken["reason"]) == ("crash", True)
    alone = play(workplace, study, "--launch", "local", check=False)
    assert (alone.returncode, "--devices" in alone.stderr) == (2, True)
