"""The restart loop, with small programs in place of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from pids import is_running
from programs import ROOT

from launch import coordinates
from launch.job import Job, LaunchError, find_run_dir
from launch.targets import local

# Does what the n-th word of its script says at the n-th attempt: an exit code, or something below.
CHILD = """
import os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[2]), os.environ.get("MTX_PROCESS_ID", "0")
attempts = folder / f"attempts-{index}"
with attempts.open("a") as file:
    file.write("x")
words = sys.argv[3 + int(index)].split(",")
word = words[min(attempts.stat().st_size, len(words)) - 1]
print("process", index, "of", os.environ.get("MTX_NUM_PROCESSES"), "does", word, flush=True)
if word.startswith("save"):
    (folder / "checkpoints" / word[4:]).mkdir(parents=True)
    (folder / "checkpoints" / word[4:] / "manifest.json").touch()
    sys.exit(1)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if word == "listen":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))
    print("listening", flush=True)
    time.sleep(60)
if word == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("listening", flush=True)
    time.sleep(60)
sys.exit(int(word))
"""


def words(folder, *scripts, **options):
    flags = {"processes": len(scripts), "backoff-s": 0.01, "grace-s": 0.3, **options}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", CHILD, "--run-dir", str(folder), *scripts]
    return [sys.executable, "-m", "launch", "local", *given, "--", *command]


def launch(folder, *scripts, **options):
    done = subprocess.run(words(folder, *scripts, **options), capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert "Traceback" not in done.stderr
    return done


@contextmanager
def launched(folder, *scripts, **options):
    command = words(folder, *scripts, **options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            heard = 0
            while heard < len(scripts):
                heard += "listening" in process.stdout.readline()
            yield process
        finally:
            process.kill()


def attempts(folder):
    return len((folder / "attempts-0").read_text())


def records(folder, event):
    lines = map(json.loads, (folder / "launch.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def assert_ended(pids):
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("script", "code", "times"), [
    ("0", 0, 1), ("2", 2, 1), ("3", 3, 1), ("5", 5, 1), ("4,4,0", 0, 3), ("6,kill,1,0", 0, 4), ("kill,2", 2, 2),
])  # fmt: skip
def test_exit_codes_in_sequence(tmp_path, script, code, times):
    done = launch(tmp_path, script)
    assert (done.returncode, attempts(tmp_path)) == (code, times), done.stderr
    assert len(records(tmp_path, "started")) == len(records(tmp_path, "ended")) == times
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [str(n + 1) for n in range(times)]
    assert (tmp_path / "logs/1/0.log").read_text() == f"process 0 of None does {script.split(',')[0]}\n"


def test_gives_up_without_progress(tmp_path):
    done = launch(tmp_path, "1", **{"max-restarts": 2})
    assert (done.returncode, attempts(tmp_path)) == (1, 3)
    assert "given up: 3 attempts in a row without a newer checkpoint" in done.stderr


def test_progress_earns_new_tries(tmp_path):
    done = launch(tmp_path, "1,1,save4,1,save8,1,1,0", **{"max-restarts": 2})
    assert (done.returncode, attempts(tmp_path)) == (1, 7)  # save8 counts as the first of three
    assert "newest checkpoint: step 8" in done.stderr


def test_output_of_processes_is_told_apart(tmp_path):
    done = launch(tmp_path, "0", "0")
    assert sorted(done.stdout.splitlines()) == ["[0] process 0 of 2 does 0", "[1] process 1 of 2 does 0"]
    assert (tmp_path / "logs/1/1.log").read_text() == "process 1 of 2 does 0\n"


def test_stopped_process_is_killed_when_another_fails(tmp_path):
    done = launch(tmp_path, "6,0", "stop,0")
    assert (done.returncode, attempts(tmp_path)) == (0, 2), done.stderr
    assert records(tmp_path, "ended")[0]["codes"] == [6, -signal.SIGKILL]
    assert "process 1 is still there" in done.stderr
    assert_ended(records(tmp_path, "started")[0]["pids"])


def test_user_mistake_of_one_process_ends_the_run(tmp_path):
    assert launch(tmp_path, "listen", "2").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_end_the_loop(tmp_path, number):
    with launched(tmp_path, "listen", "listen") as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == 4
    assert attempts(tmp_path) == 1


def test_nobody_has_to_read_the_output(tmp_path):
    command = words(tmp_path, "6,kill,0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=30) == 0
    assert attempts(tmp_path) == 3
    assert (tmp_path / "logs/3/0.log").read_text() == "process 0 of None does 0\n"


def test_second_signal_kills(tmp_path):
    with launched(tmp_path, "deaf") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parent")
def test_processes_end_with_a_killed_launcher(tmp_path):
    with launched(tmp_path, "deaf", "deaf") as process:
        process.kill()
        process.wait(timeout=20)
        assert_ended(records(tmp_path, "started")[0]["pids"])


def test_jobs_are_kept(tmp_path):
    for grace in (1, 1, 2):
        assert launch(tmp_path, "0", **{"grace-s": grace}).returncode == 0
    jobs = [json.loads((tmp_path / name).read_text()) for name in ("job.json", "job-2.json")]
    assert [job["grace_s"] for job in jobs] == [1, 2]
    assert jobs[0]["command"][-2:] == [str(tmp_path), "0"]
    assert len(records(tmp_path, "started")) == 3
    assert len(list(tmp_path.glob("job*"))) == 2


def test_environment_of_processes(tmp_path):
    job = Job(command=("mtx", "train", "a b.gin"), run_dir="x", processes_per_node=2, devices_per_process=3)
    assert local.render(job).splitlines()[1] == (
        "MTX_COORDINATOR=127.0.0.1:PORT MTX_NUM_PROCESSES=2 MTX_PROCESS_ID=1 mtx train 'a b.gin' --cpu-devices 3"
    )
    assert coordinates.coordinates(Job(command=("mtx",), run_dir="x"), 0, "a:1") == {}


def test_gpus_are_shared_out():
    job = Job(command=("mtx",), run_dir="x", processes_per_node=2)
    assert [coordinates.visible_gpus(job, i, ["4", "5", "6", "7"])["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == [
        "4,5",
        "6,7",
    ]
    assert coordinates.visible_gpus(Job(command=("mtx",), run_dir="x"), 0, ["0", "1"]) == {}
    assert (
        coordinates.visible_gpus(
            Job(command=("mtx", "--cpu-devices", "1"), run_dir="x", processes_per_node=2), 0, ["0"]
        )
        == {}
    )
    with pytest.raises(LaunchError, match="cannot share 3 GPUs evenly"):
        coordinates.visible_gpus(job, 0, ["0", "1", "2"])
    assert coordinates.find_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}) == ["GPU-a", "GPU-b"]
    assert coordinates.find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.parametrize(("command", "run_dir"), [
    (["mtx", "train", "a.gin", "--run-dir", "x/y"], "x/y"),
    (["mtx", "train", "--run-dir=z", "a.gin"], "z"),
    (["mtx", "train", "configs/runs/gpt.gin"], "runs/gpt"),
    (["sleep", "1"], None),
])  # fmt: skip
def test_run_dir_of_a_command(command, run_dir):
    assert find_run_dir(command) == run_dir


@pytest.mark.parametrize(("arguments", "message"), [
    (["local"], "no command"),
    (["local", "--", "sleep", "1"], "which run directory"),
    (["local", "--run-dir", "FOLDER/x", "--", "no-such-program"], "no-such-program: no such program"),
    (["local", "--run-dir", "x", "--", "mtx", "train", "a.gin"], "--run-dir x: the command uses runs/a"),
    (["local", "--array", "2", "--preflight", "--", "mtx", "data", "build", "--out", "x"], "--preflight is for runs"),
    (["local", "--processes", "0", "--", "mtx", "train", "a.gin"], "--processes 0: 1 or more"),
    (["local", "--devices-per-process", "2", "--", "mtx", "train", "a.gin", "--cpu-devices", "2"], "give one of them"),
    (["nowhere", "--", "mtx"], "invalid choice: 'nowhere'"),
])  # fmt: skip
def test_mistakes(tmp_path, arguments, message):
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    done = subprocess.run([sys.executable, "-m", "launch", *given], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = launch(tmp_path / "file", "0")
    assert done.returncode == 2
    assert "no attempt can be started" in done.stderr


def test_run_directory_may_hold_what_the_launcher_keeps(tmp_path):
    from mtx.checkpoints.run_directory import RunDirectory

    (tmp_path / "logs").mkdir()
    for name in ("job.json", "job-2.json", "launch.jsonl"):
        (tmp_path / name).touch()
    assert not RunDirectory.exists(tmp_path)
    assert os.listdir(tmp_path)
