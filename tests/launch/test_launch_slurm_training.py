"""Trainings on a real Slurm, and hosts that are lost there; see `slurm_cluster`."""

import sys

import numpy as np
import pytest
from commands.conftest import straight, workplace  # noqa: F401
from slurm_cluster import running_cluster
from slurm_jobs import Jobs, assert_gone

from mtx.health.journal import read_journal

SLOW = ["Train.eval_every = 1", "Train.eval_batches = 30"]
"""Steps that take long enough for a signal to come in between."""


@pytest.fixture
def jobs(tmp_path):
    """On a cluster that a test may spoil."""
    with running_cluster(3) as cluster:
        yield Jobs(cluster, tmp_path)


def train(jobs, workplace, name, *settings, options=()):  # noqa: F811
    """The number of a job of two hosts."""
    command = workplace.command(name, *settings)
    command = [word for word in command if word not in ("--cpu-devices", "1")]
    environment = workplace.environment()
    del environment["PATH"]
    options = ["slurm", "--nodes", "2", "--devices-per-process", "1", "--time", "30", *options]
    done = jobs.launch(*options, command=[sys.executable, *command], **environment)
    return done.stderr.partition("is job ")[2].split()[0]


def losses(workplace, name):  # noqa: F811
    return [loss for _, validation, loss in workplace.losses(name) if validation is None]


@pytest.mark.slow
def test_two_hosts_reach_the_losses_of_one_process(jobs, workplace, straight):  # noqa: F811
    number = train(jobs, workplace, "slurm-two", options=["--preflight"])
    job = jobs.wait_state(number, "COMPLETED", "FAILED", timeout_s=200)
    log = (workplace.folder / f"slurm-two/logs/slurm-{number}.log").read_text()
    assert (job["ExitCode"], job["NumNodes"]) == ("0:0", "2"), log
    assert "launch: preflight 1: " in log
    assert len(losses(workplace, "slurm-two")) == 20
    np.testing.assert_allclose(losses(workplace, "slurm-two"), losses(workplace, straight), rtol=3e-5)


@pytest.mark.slow
def test_a_training_that_is_queued_again_goes_on(jobs, workplace, straight):  # noqa: F811
    number = train(jobs, workplace, "slurm-again", *SLOW)
    metrics = workplace.folder / "slurm-again/metrics.jsonl"
    jobs.cluster.wait_for(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), 120)
    jobs.cluster("scancel", "--signal=USR1", "--batch", number)
    job = jobs.wait_state(number, "COMPLETED", "FAILED", timeout_s=300)
    log = (workplace.folder / f"slurm-again/logs/slurm-{number}.log").read_text()
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log
    events = read_journal(workplace.folder / "slurm-again")
    (preempted,) = (event for event in events if event["event"] == "preempted")
    (resumed,) = (event for event in events if event["event"] == "resumed")
    assert preempted["step"] == resumed["step"] < 20
    np.testing.assert_allclose(losses(workplace, "slurm-again"), losses(workplace, straight), rtol=3e-5)


@pytest.mark.slow
def test_a_lost_host_is_replaced_and_writes_no_more(jobs):
    """Of a host whose slurmd has gone the processes run on: they must not outlive the allocation."""
    number = jobs.submit("bereft", "once", "--nodes", "2", "--sbatch=--exclude=n1", "--life-line-s", "5")
    jobs.wait_told("bereft")
    assert [jobs.told("bereft", rank)[0]["SLURMD_NODENAME"] for rank in range(2)] == ["n2", "n3"]
    orphan = jobs.told("bereft", 1)[0]["pid"]
    jobs.cluster.slurmd["n3"].kill()
    jobs.cluster.wait_for(lambda: jobs.cluster.job(number)["JobState"] != "RUNNING", 90)
    assert_gone(orphan, timeout_s=40)
    jobs.cluster("scontrol", "update", f"jobid={number}", "excnodelist=")
    jobs.wait_told("bereft", count=2, timeout_s=90)
    assert jobs.wait_state(number, "COMPLETED")["Restarts"] == "1"
    assert "n1" in {jobs.told("bereft", rank)[1]["SLURMD_NODENAME"] for rank in range(2)}


@pytest.mark.slow
def test_a_lost_first_host_ends_its_loop(jobs):
    """It notices by itself that Slurm has given its job away: nobody can tell it."""
    number = jobs.submit("beheaded", "once", "--life-line-s", "5")
    jobs.wait_told("beheaded", processes=1)
    first = jobs.told("beheaded")[0]
    jobs.cluster.slurmd[first["SLURMD_NODENAME"]].kill()
    jobs.wait_told("beheaded", processes=1, count=2, timeout_s=120)
    assert jobs.told("beheaded")[1]["SLURMD_NODENAME"] != first["SLURMD_NODENAME"]
    assert_gone(first["pid"], timeout_s=60)
    assert jobs.wait_state(number, "COMPLETED")["Restarts"] == "1"
    assert len(jobs.told("beheaded")) == 2
