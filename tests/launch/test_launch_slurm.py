"""What Slurm is told: rendered texts, hostile values, mistakes. Slurm itself is not asked."""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from programs import ROOT

from launch import allocation
from launch.allocation import SlurmJob, from_fields
from launch.hostlist import expand_hosts
from launch.job import LaunchError, keep, read
from launch.nodes import Node, announce
from launch.targets import slurm

GOLDEN = ROOT / "tests/golden/launch"
HOSTILE = [
    "a b",
    "q'uote",
    'dou"ble',
    "$(touch pwned)",
    "`touch pwned`",
    "line\nbreak",
    "-leading",
    "x;touch pwned",
    "*",
]


def make(tmp_path=None, **more):
    fields = {
        "command": ("mtx", "train", "run.gin", "--run-dir", "/scratch/run"), "run_dir": "/scratch/run",
        "working_directory": "/home/me", "python": "/opt/env/bin/python", **more,
    }  # fmt: skip
    return SlurmJob(**fields)


@pytest.mark.parametrize(("text", "hosts"), [
    ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
    ("gpu[01-03,7],login1", ["gpu01", "gpu02", "gpu03", "gpu7", "login1"]),
    ("gpu-[3,7]-ib", ["gpu-3-ib", "gpu-7-ib"]),
    ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ("fe80::1,[::1],a", ["fe80::1", "::1", "a"]),
    ("b a,a", ["b", "a", "a"]),
])  # fmt: skip
def test_expands_host_lists(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", [
    "", " ,", "a[", "a]", "a[]", "a[1-]", "a[3-1]", "a[x]", "a[1[2]]", "a[1-999999]", "a[1-999]b[1-999]", "-oProxy",
    "$(x)", "a;b", "a[1,]",
])  # fmt: skip
def test_refuses_malformed_host_lists(text):
    with pytest.raises(LaunchError, match="host list"):
        expand_hosts(text)


GOLDENS = {
    "slurm_one": make(),
    "slurm_two": make(
        num_nodes=2, gpus_per_node=8, processes_per_node=8, partition="h100", account="lab", time_limit="1-12:00:00",
        cpus_per_node=96, mem="0", environment=(("NCCL_DEBUG", "WARN"), ("XLA_FLAGS", "--xla_a=1 --xla_b=$(x)")),
        sbatch_options=("--exclusive", "--mail-type=END"),
    ),
    "slurm_array": make(command=("mtx", "data", "build", "in put", "--out", "/scratch/store"), tasks=64, parallel=8),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_renders_as_kept(name):
    rendered = slurm.render(GOLDENS[name]).replace(str(ROOT), "/opt/mtx") + "\n"
    path = GOLDEN / f"{name}.txt"
    if "MTX_WRITE_GOLDEN" in os.environ:
        path.write_text(rendered)
    assert rendered == path.read_text()


def test_no_shell_reads_a_value(tmp_path):
    """The script is run with a program in place of the loop that shows what it was given."""
    show = tmp_path / "show $(touch pwned) it"
    show.write_text(f"#!{sys.executable}\nimport os, sys\nprint([sys.argv[1:], os.environ['VALUE'], os.getcwd()])\n")
    show.chmod(0o755)
    for value in HOSTILE:
        folder = tmp_path / f"in {value}".replace("/", "")
        folder.mkdir()
        job = make(
            command=("mtx", value), working_directory=str(folder), python=str(show), environment=(("VALUE", value),),
            run_dir="run",
        )  # fmt: skip
        for text, words in [
            (slurm.script(job, "run/job.json"), ["-m", "launch.allocation", f"{folder}/run/job.json"]),
            (slurm.merge_script(replace(job, command=(str(show), value), tasks=2)), [value, "--merge"]),
            (slurm.array_script(replace(job, command=(str(show), value), tasks=2)), [value, "--shard", "1/2"]),
        ]:
            env = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
            done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=env, timeout=30)
            assert done.stdout.strip() == repr([words, value, str(folder)]), done.stderr
        assert not list(tmp_path.rglob("pwned"))


def test_a_dry_run_can_be_pasted(tmp_path):
    """The rendered command, run by a shell, gives sbatch its words and the script as they are."""
    (tmp_path / "sbatch").write_text(f"#!{sys.executable}\nimport sys\nprint([sys.argv[1:], sys.stdin.read()])\n")
    (tmp_path / "sbatch").chmod(0o755)
    job = make(command=("mtx", "$(touch pwned)"), partition="a b", environment=(("A", "x\nEND\ny"),))
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"], input=slurm.render(job), capture_output=True, text=True, env=env, timeout=30, cwd=tmp_path
    )
    assert done.stdout.strip() == repr([slurm.sbatch(job)[1:], slurm.script(job, "/scratch/run/job.json")])
    assert "--partition=a b" in slurm.sbatch(job)


def test_values_of_variables_are_on_no_command_line():
    job = make(environment=(("TOKEN", "secret"),), num_nodes=2)
    words = [*slurm.sbatch(job), *allocation.srun_words(job, "x", hosts=2)]
    words += allocation.worker_words(job, "a:1", "/logs", job.command)
    assert not any("secret" in word for word in words)


def test_a_variable_whose_name_a_shell_would_read_is_refused():
    with pytest.raises(LaunchError, match="no name of a variable"):
        slurm.render(make(environment=(("A;touch pwned", "1"),)))


def test_a_percent_sign_of_a_path_is_not_a_pattern():
    (output,) = (word for word in slurm.sbatch(make(run_dir="/scratch/100%j")) if word.startswith("--output"))
    assert output == "--output=/scratch/100%%j/logs/slurm-%j.log"


def test_a_job_is_read_as_it_was_kept(tmp_path):
    for job in GOLDENS.values():
        job = replace(job, run_dir=str(tmp_path))
        assert from_fields(read(keep(job, "slurm", ["slurm"]))[1]) == job


def launch(*words, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        [sys.executable, "-m", "launch", "slurm", *words], capture_output=True, text=True, timeout=50, cwd=ROOT,
        env={**env, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(("options", "told"), [
    (["--sbatch=exclusive"], "an option of sbatch in one word"),
    (["--sbatch=-"], "an option of sbatch in one word"),
    (["--time", "soon"], "--time soon: minutes"),
    (["--time", "2"], "--time 2 is 120 s, and --warn-s 120"),
    (["--time", "1:30"], "--time 1:30 is 90 s"),
    (["--nodes", "0"], "--nodes 0: 1 or more"),
    (["--gpus-per-node", "8", "--processes-per-node", "3"], "cannot share 8 GPUs evenly"),
    (["--warn-s", "-1"], "--warn-s -1: 0 or more"),
])  # fmt: skip
def test_mistakes_are_told(tmp_path, options, told):
    done = launch(*options, "--dry-run", "--", "mtx", "train", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_a_path_that_slurm_reads_otherwise_is_refused(tmp_path, name):
    done = launch("--dry-run", "--", "mtx", "train", "--run-dir", str(tmp_path / name))
    assert done.returncode == 2
    assert "neither backslashes nor line breaks" in done.stderr


def test_without_slurm_it_says_so(tmp_path):
    done = launch("--", "mtx", "train", "--run-dir", str(tmp_path / "run"), PATH=str(tmp_path))
    assert done.returncode == 2
    assert "sbatch: no such program; run this on a login node" in done.stderr


def test_280_nodes_are_one_command():
    done = launch("--nodes", "280", "--gpus-per-node", "8", "--dry-run", "--", "mtx", "train", "--run-dir", "/r")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("sbatch "))
    words = shlex.split(line.rpartition(" <<")[0])
    assert {"--nodes=280", "--gpus-per-node=8", "--ntasks-per-node=1"} <= set(words)
    assert not Path("/r").exists()


@pytest.mark.parametrize(("text", "seconds"), [
    ("5", 300), ("5:30", 330), ("1:00:00", 3600), ("1-0", 86400), ("1-2:3", 93780), ("2-0:0:1", 172801),
    ("UNLIMITED", None),
])  # fmt: skip
def test_time_limits(text, seconds):
    assert slurm._seconds(text) == seconds


def test_a_step_leaves_nothing_to_the_site():
    words = allocation.srun_words(make(num_nodes=4, gpus_per_node=8, cpus_per_node=32), "step", hosts=4)
    wanted = {
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--gpus-per-node=8",
        "--cpus-per-task=32",
    }
    assert wanted <= set(words)


def test_an_allocation_that_is_too_small(monkeypatch):
    with pytest.raises(LaunchError, match=r"--nodes 3: this allocation, job 7, has 2 \(n\[1-2\]\)"):
        allocation.Allocation(make(num_nodes=3), {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"})


@pytest.mark.parametrize(("told", "expected"), [
    ("JobId=7 JobState=RUNNING Restarts=1", None),
    ("JobId=7 JobState=PENDING Restarts=2", "Slurm has ended this allocation (job 7 is pending)"),
    ("JobId=7 JobState=RUNNING Restarts=2", "Slurm has started job 7 again elsewhere"),
    ("", None),
])  # fmt: skip
def test_a_loop_notices_that_its_job_was_given_away(tmp_path, monkeypatch, told, expected):
    """Nobody can tell a host that Slurm has lost: it asks, also while processes run."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{told}'\necho >> '{tmp_path}/asked'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(allocation, "WATCH_S", 0.01)
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}
    announce(tmp_path, Node(0, "n1", 1, 0.0, [0]))
    here = allocation.Allocation(make(), environment)
    deadline = time.monotonic() + 20
    asked = tmp_path / "asked"
    while not (here.trouble(tmp_path) if expected else asked.exists() and asked.stat().st_size > 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert here.trouble(tmp_path) == expected
    here._lost = "the test is over"


def test_a_host_that_has_not_told_counts_by_what_srun_ended_with(tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "WATCH_S", 60)
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    here = allocation.Allocation(make(num_nodes=2), environment)
    announce(tmp_path, Node(0, "n1", 1, 0.0, [0], [4], [4]))
    assert here.codes(tmp_path, [137], [137]) == [4, 137]
    announce(tmp_path, Node(1, "n2", 1, 0.0, [1], [3], [3]))
    assert here.codes(tmp_path, [137], [137]) == [4, 3]
