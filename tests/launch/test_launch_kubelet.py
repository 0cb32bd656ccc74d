"""Manifests are carried out: pods as processes on hosts of a private network, and restarts as the policies say."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from commands.conftest import Workplace, straight, workplace
from fake_kubelet import Cluster
from network_hosts import make_network
from programs import ROOT, environment

from launch import yaml_text
from launch.__main__ import _parser
from launch.manifests import manifests, merge_manifest
from launch.targets import kubernetes

__all__ = ["Workplace", "straight", "workplace"]

# Does what the n-th word of its script says at the n-th attempt of its process, as in the tests of the local target.
CHILD = """
import os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[2]), os.environ.get("MTX_PROCESS_ID", os.environ["JOB_COMPLETION_INDEX"])
attempts = folder / f"attempts-{index}"
with attempts.open("a") as file:
    file.write("x")
words = sys.argv[3 + int(index)].split(",")
word = words[min(attempts.stat().st_size, len(words)) - 1]
if word == "listen":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    (folder / f"listens-{index}").touch()
    time.sleep(60)
    sys.exit(1)
if word.startswith("meet"):
    others = [folder / f"attempts-{i}" for i in range(len(sys.argv) - 3)]
    while not all(other.exists() and other.stat().st_size >= attempts.stat().st_size for other in others):
        time.sleep(0.05)
    sys.exit(int(word[4:]))
if word.startswith("save"):
    (folder / "checkpoints" / word[4:]).mkdir(parents=True)
    (folder / "checkpoints" / word[4:] / "manifest.json").touch()
    sys.exit(6)
sys.exit(int(word))
"""


def make_job(folder, kind, *words, command):
    given = ["--image", "i", "--kind", kind, "--volume", f"data:{folder}", "--gpus-per-node", "0", "--python",
             sys.executable, "--workdir", str(ROOT), "--backoff-s", "0.01", "--grace-s", "5", *words]  # fmt: skip
    return kubernetes.make_job(_parser().parse_args(["kubernetes", *given]), list(map(str, command)))


def carry_out(job, kind, folder, network=None, image=None, look=lambda cluster: None, timeout_s=60):
    folder.mkdir(exist_ok=True)
    cluster = Cluster(network, folder, image or environment())
    cluster.apply(yaml_text.dump_all(manifests(job, kind)))
    ended = cluster.run(timeout_s, lambda: look(cluster))
    return cluster, ended


def children(folder, kind, *scripts, words=(), look=lambda cluster: None):
    command = [sys.executable, "-c", CHILD, "--run-dir", folder / "run", *scripts]
    job = make_job(folder, kind, "--nodes", str(len(scripts)), *words, command=command)
    (folder / "run").mkdir()
    return carry_out(job, kind, folder / "pods", look=look)


def attempts(folder, index=0):
    return len((folder / "run" / f"attempts-{index}").read_text())


def records(folder, event):
    lines = map(json.loads, (folder / "launch.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("kind", ["jobset", "job"])
@pytest.mark.parametrize("code", [2, 3, 5])
def test_final_codes_end_the_job(tmp_path, kind, code):
    cluster, ended = children(tmp_path, kind, str(code))
    assert (ended, attempts(tmp_path), cluster.count("start")) == ("Failed PodFailurePolicy", 1, 1), cluster.told()


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_failures_start_again(tmp_path, kind):
    cluster, ended = children(tmp_path, kind, "6,1,4,0")
    assert (ended, attempts(tmp_path)) == ("Complete", 4), cluster.told()
    assert [line["codes"] for line in records(tmp_path / "run", "ended")] == [[6], [1], [4], [0]]
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["1", "2", "3", "4"]
    assert cluster.restarts == (3 if kind == "jobset" else 0)


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_gives_up_without_progress(tmp_path, kind):
    cluster, ended = children(tmp_path, kind, "6,save3,6,6,6,6,6", words=("--max-restarts", "2"))
    assert (ended, attempts(tmp_path)) == ("Failed PodFailurePolicy", 4), cluster.told()
    assert ("end", cluster.log[-1][1], 0, 7) in cluster.log
    assert "given up: 3 attempts in a row without a newer checkpoint" in cluster.told()
    last = records(tmp_path / "run", "ended")[-1]
    assert (last["failures"], last["newest_step"]) == (0, 3)  # who submits it again begins to count anew


def test_a_final_code_of_one_pod_ends_all(tmp_path):
    cluster, ended = children(tmp_path, "jobset", "listen", "2")
    assert ended == "Failed PodFailurePolicy", cluster.told()
    assert cluster.count("start") == 2
    assert any(entry[0] == "deleted" and entry[2:] == (0, 4) for entry in cluster.log), cluster.told()


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_preempted_pods_start_again(tmp_path, kind):
    taken = []

    def look(cluster):
        (job,) = cluster.jobs.values()
        if not taken and all((tmp_path / "run" / f"listens-{index}").exists() for index in (0, 1)):
            taken.extend(job.pods.values())
            for pod in taken if kind == "job" else taken[:1]:  # a run tells all its processes when one must go
                cluster.preempt(pod)

    cluster, ended = children(tmp_path, kind, "listen,meet0", "listen,meet0", look=look)
    assert (ended, attempts(tmp_path, 0), attempts(tmp_path, 1)) == ("Complete", 2, 2), cluster.told()
    assert cluster.restarts == (1 if kind == "jobset" else 0)


def test_hosts_join_an_attempt_only_once(tmp_path):
    """Without JobSets a pod that is started again waits until the first one has begun anew."""
    cluster, ended = children(tmp_path, "job", "meet6,meet0", "meet6,meet0")
    assert (ended, attempts(tmp_path, 0), attempts(tmp_path, 1)) == ("Complete", 2, 2), cluster.told()
    for number in ("1", "2"):
        assert {path.name for path in (tmp_path / "run/logs" / number).glob("*.json")} == {"node-0.json", "node-1.json"}


# In place of mtx: notes what it is asked for; as a doctor it finds the first attempt ill.
MTX = """
import pathlib, sys
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
with (run_dir / "asked").open("a") as file:
    file.write(sys.argv[1] + " ")
sys.exit(6 if sys.argv[1] == "doctor" and (run_dir / "asked").read_text() == "doctor " else 0)
"""


def test_preflight_comes_before_every_attempt(tmp_path):
    mtx, run_dir = tmp_path / "mtx", tmp_path / "run"
    mtx.write_text(f"#!{sys.executable}\n{MTX}")
    mtx.chmod(0o755)
    run_dir.mkdir()
    job = make_job(tmp_path, "jobset", "--preflight", command=[mtx, "train", "--run-dir", run_dir])
    cluster, ended = carry_out(job, "jobset", tmp_path / "pods")
    assert (ended, (run_dir / "asked").read_text()) == ("Complete", "doctor doctor train "), cluster.told()
    assert (run_dir / "logs/1/preflight/0.log").exists()
    assert not (run_dir / "logs/1/0.log").exists()
    assert (run_dir / "logs/2/0.log").exists()


# One shard each; fails first where the script says so. The merge wants all of them.
SHARD = """
import pathlib, sys
store, words = pathlib.Path(sys.argv[2]), sys.argv[3:]
store.mkdir(exist_ok=True)
if words == ["--merge"]:
    names = sorted(path.name for path in store.glob("*-of-*"))
    assert names == ["0-of-3", "1-of-3", "2-of-3"], names
    (store / "merged").touch()
    sys.exit()
option, text = words
index, count = text.split("/")
tried = store / f"tried-{index}"
if index == "1" and not tried.exists():
    tried.touch()
    sys.exit(1)
(store / f"{index}-of-{count}").touch()
"""


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_array_and_merge(tmp_path, kind):
    command = [sys.executable, "-c", SHARD, "--out", tmp_path / "store"]
    job = make_job(tmp_path, kind, "--array", "3", "--parallel", "2", command=command)
    cluster, ended = carry_out(job, kind, tmp_path / "pods")
    assert ended == "Complete", cluster.told()
    if kind == "job":
        assert not (tmp_path / "store/merged").exists()
        cluster.ended = ""
        cluster.apply(yaml_text.dump(merge_manifest(job)))
        assert cluster.run(30) == "Complete", cluster.told()
    assert (tmp_path / "store/merged").exists()
    assert cluster.count("start") == 5


def test_array_ends_at_a_shard_that_fails_too_often(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit(1)", "--out", tmp_path / "store"]
    job = make_job(tmp_path, "jobset", "--array", "2", "--parallel", "1", "--max-restarts", "2", command=command)
    cluster, ended = carry_out(job, "jobset", tmp_path / "pods")
    assert (ended, cluster.count("start")) == ("Failed MaxFailedIndexesExceeded", 3), cluster.told()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with make_network(tmp_path_factory.mktemp("pods"), 2) as made:
        yield made


def train(workplace, network, kind, name, *settings, look=lambda cluster: None):
    """A run of two pods with a simulated device each."""
    command = [sys.executable, *workplace.command(name, *settings)]
    job = make_job(workplace.folder, kind, "--nodes", "2", "--name", name, command=command)
    image = workplace.environment()
    cluster, ended = carry_out(job, kind, workplace.folder / f"{name}-pods", network, image, look, timeout_s=250)
    assert ended == "Complete", cluster.told()
    return cluster


def losses(workplace, name):
    """Of each step, the last one told: steps since the checkpoint are repeated."""
    told = {step: loss for step, validation, loss in workplace.losses(name) if validation is None}
    return [told[step] for step in sorted(told)]


@pytest.mark.slow
def test_two_pods_learn_what_one_process_learns(workplace, network, straight):
    cluster = train(workplace, network, "jobset", "pods")
    assert cluster.count("start") == 2
    np.testing.assert_allclose(losses(workplace, "pods"), losses(workplace, straight), rtol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_killed_pod_is_started_again(workplace, network, straight, kind):
    name, killed = f"killed-{kind}", []
    metrics = workplace.folder / name / "metrics.jsonl"

    def look(cluster):
        if not killed and metrics.exists() and '"step": 6,' in metrics.read_text():
            (job,) = cluster.jobs.values()
            killed.append(time.monotonic())
            os.killpg(job.pods[1].process.pid, signal.SIGKILL)

    slow = ["Train.eval_every = 1", "Train.eval_batches = 30"]
    cluster = train(workplace, network, kind, name, *slow, look=look)
    assert killed
    assert cluster.count("start") == 4, cluster.told()
    assert len(workplace.events(name, "resumed")) == 1
    np.testing.assert_allclose(losses(workplace, name), losses(workplace, straight), rtol=3e-5)
