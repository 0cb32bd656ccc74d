"""A real Slurm starts, stops, restarts and gives up programs; see `slurm_cluster`."""

import os
import signal
import sys
import time

import pytest
from slurm_cluster import running_cluster
from slurm_jobs import Jobs, assert_gone


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(3) as cluster:
        yield cluster


@pytest.fixture
def jobs(cluster, tmp_path):
    yield Jobs(cluster, tmp_path)
    cluster("scancel", "--user=root")
    cluster.wait_for(lambda: not cluster("squeue", "-h").stdout.strip())


def test_every_process_is_told_what_it_needs(jobs):
    hostile = ["a b", "q'", '"', f"$(touch {jobs.folder}/pwned)", "line\nbreak", "-x", "*"]
    number = jobs.submit("run %j $(x) '", "end", "--nodes", "2", "--gpus-per-node", "4", "--processes-per-node", "2",
                         extra=hostile)  # fmt: skip
    assert jobs.wait_state(number, "COMPLETED", "FAILED", name="run %j $(x) '")["ExitCode"] == "0:0"
    told = [jobs.told("run %j $(x) '", rank)[0] for rank in range(4)]
    assert [one["MTX_PROCESS_ID"] for one in told] == ["0", "1", "2", "3"]
    assert [one["SLURM_NODEID"] for one in told] == ["0", "0", "1", "1"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["0,1", "2,3"] * 2
    assert {one["MTX_NUM_PROCESSES"] for one in told} == {"4"}
    assert len({one["MTX_COORDINATOR"] for one in told}) == 1
    assert all(one["words"] == hostile for one in told)
    assert not (jobs.folder / "pwned").exists()
    logs = jobs.folder / "run %j $(x) '" / "logs"
    assert (logs / f"slurm-{number}.log").exists()
    assert {f"{rank}.log" for rank in range(4)} <= {path.name for path in (logs / "1").iterdir()}


def test_stop_saves_and_ends(jobs):
    number = jobs.submit("stopped", "sleep", "--nodes", "2")
    jobs.wait_told("stopped")
    assert "running on n[1-2]" in jobs.launch("status", "stopped", command=None).stdout
    jobs.launch("stop", "stopped", command=None)
    assert jobs.wait_state(number, "FAILED", "COMPLETED", "CANCELLED")["ExitCode"] == "4:0"
    assert jobs.log("stopped").count("hears SIGTERM") == 2
    assert "ended exit code 4 (preempted, everything is saved)" in jobs.launch(
        "status", "stopped", command=None
    ).stdout  # fmt: skip
    assert len(jobs.records("stopped", "started")) == 1


def test_scancel_saves_and_starts_nothing_more(jobs):
    number = jobs.submit("cancelled", "sleep", "--nodes", "2")
    jobs.wait_told("cancelled")
    jobs.cluster("scancel", number)
    jobs.wait_state(number, "CANCELLED")
    jobs.cluster.wait_for(lambda: jobs.log("cancelled").count("hears SIGTERM") == 2)
    assert_gone(*(jobs.told("cancelled", rank)[0]["pid"] for rank in range(2)))
    time.sleep(2)
    assert len(jobs.told("cancelled")) == 1


def test_a_killed_process_is_started_again_in_the_same_allocation(jobs):
    number = jobs.submit("killed", "once", "--nodes", "2")
    jobs.wait_told("killed")
    os.kill(jobs.told("killed", 1)[0]["pid"], signal.SIGKILL)
    assert jobs.wait_state(number, "COMPLETED", "FAILED", name="killed")["ExitCode"] == "0:0", jobs.log("killed")
    first, second = jobs.told("killed", 1)
    assert first["SLURM_JOB_ID"] == second["SLURM_JOB_ID"] == number
    assert second["SLURM_RESTART_COUNT"] is None
    assert "killed by signal 9" in jobs.records("killed", "ended")[0]["reason"]
    assert_gone(*(one["pid"] for rank in range(2) for one in jobs.told("killed", rank)))


def test_the_warning_of_the_time_limit_queues_the_job_again(jobs):
    number = jobs.submit("warned", "once", "--nodes", "2", "--time", "10")
    jobs.wait_told("warned")
    jobs.cluster("scancel", "--signal=USR1", "--batch", number)
    jobs.wait_told("warned", count=2)
    assert jobs.wait_state(number, "COMPLETED")["Restarts"] == "1"
    assert [one["SLURM_RESTART_COUNT"] for one in jobs.told("warned", 1)] == [None, "1"]
    assert jobs.log("warned").count("hears SIGUSR1") == 2
    assert f"job {number} is queued again" in jobs.log("warned")


def test_stop_wins_over_the_warning_of_the_time_limit(jobs):
    number = jobs.submit("both", "slow", "--nodes", "2", "--time", "10")  # still saves when it is to stop
    jobs.wait_told("both")
    jobs.cluster("scancel", "--signal=USR1", "--batch", number)
    jobs.launch("stop", "both", command=None, check=False)  # waits for the end
    assert jobs.wait_state(number, "FAILED", "CANCELLED", "COMPLETED")
    assert len(jobs.told("both")) == 1


@pytest.mark.slow
def test_the_time_limit_itself(jobs):
    """Slurm sends the warning up to a minute early, here after about 15 s of the 60."""
    number = jobs.submit("limited", "once", "--nodes", "2", "--time", "1", "--warn-s", "30")
    jobs.wait_told("limited", count=2, timeout_s=120)
    assert jobs.wait_state(number, "COMPLETED")["Restarts"] == "1"
    assert jobs.log("limited").count("hears SIGUSR1") == 2


def test_a_requeue_that_is_refused_says_how_to_go_on(jobs):
    number = jobs.submit("refused", "once", "--sbatch=--no-requeue")
    jobs.wait_told("refused", processes=1)
    jobs.cluster("scancel", "--signal=USR1", "--batch", number)
    assert jobs.wait_state(number, "FAILED", "COMPLETED")["ExitCode"] == "4:0"
    assert f"Slurm does not queue job {number} again" in jobs.log("refused")
    assert " -m launch slurm " in jobs.log("refused")


def test_a_node_that_never_comes_up(jobs):
    (jobs.folder / "never").mkdir()
    command = [sys.executable, str(jobs.program), "--run-dir", str(jobs.folder / "never"), "end"]
    done = jobs.launch("slurm", "--partition", "broken", command=command, check=False)
    if done.returncode == 0:  # Slurm has not missed it yet
        number = done.stderr.partition("is job ")[2].split()[0]
        assert jobs.cluster.job(number)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING")
        found = jobs.launch("status", "never", command=None).stdout
        assert "pending (" in found or "running" in found
        jobs.launch("stop", "never", command=None)
        jobs.wait_state(number, "CANCELLED")
    else:
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert "Slurm does not take the job: " in done.stderr
    assert not jobs.told("never")


def test_a_job_that_waits_says_why(jobs):
    jobs.submit("first", "sleep", "--nodes", "3", "--sbatch=--exclusive")
    jobs.submit("second", "end", "--nodes", "3")
    jobs.cluster.wait_for(
        lambda: any(
            f"pending ({reason})" in jobs.launch("status", "second", command=None).stdout
            for reason in ("Resources", "Priority")
        )
    )
    jobs.launch("stop", "second", command=None)
    jobs.cluster.wait_for(lambda: "cancelled" in jobs.launch("status", "second", command=None).stdout)


def test_what_slurm_refuses_is_told_before(jobs):
    command = [sys.executable, "-c", "", "--run-dir", str(jobs.folder / "x")]
    for options, told in [
        (["--partition", "none $(x)"], "invalid partition specified"),
        (["--nodes", "99"], "not available"),
        (["--gpus-per-node", "5"], "not available"),
    ]:
        done = jobs.launch("slurm", *options, command=command, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("launch: Slurm does not take the job: ")
        assert told in done.stderr.lower(), done.stderr
        assert done.stderr.count("\n") == 1


def test_two_jobs_on_one_node(jobs):
    numbers = [jobs.submit(name, "sleep", "--nodes", "2", "--sbatch=--nodelist=n1,n2") for name in ("one", "other")]
    for name in ("one", "other"):
        jobs.wait_told(name)
    assert jobs.told("one")[0]["MTX_COORDINATOR"] != jobs.told("other")[0]["MTX_COORDINATOR"]
    jobs.launch("stop", "one", command=None)
    jobs.wait_state(numbers[0], "FAILED")
    assert jobs.cluster.job(numbers[1])["JobState"] == "RUNNING"
    jobs.launch("stop", "other", command=None)
    jobs.wait_state(numbers[1], "FAILED")


@pytest.mark.parametrize("prefix", [[], ["salloc", "--nodes=2"]])
def test_an_array_and_what_merges_it(jobs, prefix):
    program = jobs.folder / "shards.py"
    program.write_text(
        "import pathlib, sys\nout = pathlib.Path(sys.argv[2])\nout.mkdir(exist_ok=True)\n"
        "name = sys.argv[-1].replace('/', '-of-')\n"
        "(out / name).write_text(' '.join(sorted(path.name for path in out.iterdir())))\n"
    )
    out = jobs.folder / "st ore"
    options = ["slurm", "--array", "3", "--parallel", "2", "--name", "shards", "--wait"]
    command = [sys.executable, str(program), "--out", str(out)]
    done = jobs.launch(*options, prefix=prefix, command=command, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["--merge", "0-of-3", "1-of-3", "2-of-3"]
    assert (out / "--merge").read_text() == "0-of-3 1-of-3 2-of-3"
    ended = "ended (exit code 0 (done))" if prefix else "ended completed"
    assert ended in jobs.launch("status", "shards", command=None).stdout


def test_inside_an_allocation_it_runs_right_there(jobs):
    (jobs.folder / "inside").mkdir()
    command = [sys.executable, str(jobs.program), "--run-dir", str(jobs.folder / "inside"), "end"]
    done = jobs.launch("slurm", "--nodes", "2", prefix=["salloc", "--nodes=3"], command=command, check=False)
    assert done.returncode == 0, done.stderr
    assert [jobs.told("inside", rank)[0]["SLURM_NODEID"] for rank in range(2)] == ["0", "1"]
    more = jobs.launch("slurm", "--nodes", "4", prefix=["salloc", "--nodes=3"], command=command, check=False)
    assert more.returncode == 2
    assert "--nodes 4: this allocation" in more.stderr
