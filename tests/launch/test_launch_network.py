"""Two hosts on a network of their own; the link of one is cut in the middle of a step."""

import json
import subprocess
import sys
import time

import pytest
from commands.conftest import Workplace, straight, workplace
from network_hosts import IPV6, USER, make_ssh_network
from pids import is_running
from programs import ROOT

__all__ = ["Workplace", "straight", "workplace"]

LIFE_LINE_S, GRACE_S = 10, 10


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with make_ssh_network(tmp_path_factory.mktemp("network"), 2) as made:
        yield made


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory, monkeypatch):
    """Where names of jobs are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def train(network, servers, workplace, name, *settings):
    """A training of two hosts, started on the user's machine; what it prints is in NAME.out."""
    options = ["--devices-per-process", "1", "--life-line-s", LIFE_LINE_S, "--grace-s", GRACE_S, "--backoff-s", 1]
    command = [word for word in workplace.command(name, *settings) if word not in ("--cpu-devices", "1")]
    launch = [sys.executable, "-m", "launch", "ssh", "--hosts", "h[1-2]", "--ssh-config", servers.config, *options]
    words = [*network.inside(USER), *launch, "--", sys.executable, *command]
    with open(workplace.folder / f"{name}.out", "w") as file:
        return subprocess.Popen(
            list(map(str, words)), env=workplace.environment(), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )


def wait_for(condition, seconds, told):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, told()
        time.sleep(0.05)
    return time.monotonic() - begin


def training_losses(workplace, name):
    """Of each step, the last one told: steps since the checkpoint are repeated."""
    return {step: loss for step, validation, loss in workplace.losses(name) if validation is None}


def attempts(workplace, name, event):
    lines = map(json.loads, (workplace.folder / name / "launch.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.slow
def test_cut_link_is_told_and_mended(network, workplace):
    hosts, servers = network
    undisturbed = train(hosts, servers, workplace, "linked")
    assert undisturbed.wait(timeout=200) == 0, (workplace.folder / "linked.out").read_text()

    name = "cut"
    told = (workplace.folder / "cut.out").read_text
    metrics = workplace.folder / name / "metrics.jsonl"
    slow = ["Train.eval_every = 1", "Train.eval_batches = 30"]
    process = train(hosts, servers, workplace, name, *slow)
    try:
        wait_for(lambda: metrics.exists() and '"step": 6,' in metrics.read_text(), 150, told)
        hosts.set_link("h2", "down")
        wait_for(lambda: "host h2 was lost" in told(), 15 + 3 * GRACE_S, told)
        wait_for(lambda: "waits for 1 of 2 hosts: h2" in told(), 40, told)
        assert process.poll() is None
        hosts.set_link("h2", "up")
        assert process.wait(timeout=200) == 0, told()
    finally:
        process.kill()
        process.wait()
        hosts.set_link("h2", "up")
    assert len(attempts(workplace, name, "started")) == 2
    first, last = attempts(workplace, name, "ended")
    assert first["codes"] != [0, 0]
    assert last["codes"] == [0, 0]
    assert [event["step"] for event in workplace.events(name, "resumed")] == [4]
    assert training_losses(workplace, name) == training_losses(workplace, "linked")


CHILD = """
import os, pathlib, sys, time
index = os.environ["MTX_PROCESS_ID"]
text = f"{os.getpid()} {os.uname().nodename} {os.environ['MTX_COORDINATOR']}"
pathlib.Path(sys.argv[2], f"told-{index}").write_text(text)
time.sleep(float(sys.argv[3]))
"""


def start_small(network, servers, folder, seconds):
    """A job of processes that tell what they are given, and wait."""
    launch = [sys.executable, "-m", "launch", "ssh", "--hosts", "h[1-2]", "--ssh-config", str(servers.config)]
    options = ["--life-line-s", "5", "--grace-s", "1"]
    command = [sys.executable, "-c", CHILD, "--run-dir", str(folder), str(seconds)]
    words = [*network.inside(USER), *launch, *options, "--", *command]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_hosts_meet_at_an_address_of_version_6(tmp_path):
    with make_ssh_network(tmp_path, 2, IPV6) as (network, servers):
        with start_small(network, servers, tmp_path, 0) as process:
            output = process.stdout.read()
        assert process.returncode == 0, output
        for index, name in enumerate(["h1", "h2"]):
            _, host, coordinator = (tmp_path / f"told-{index}").read_text().split()
            assert host == name
            assert coordinator.startswith("[fd77::1]:")


def test_hosts_end_what_nobody_watches(network, tmp_path):
    """The user's machine is cut off: it cannot tell the hosts anything any more."""
    hosts, servers = network
    process = start_small(hosts, servers, tmp_path, 60)
    try:
        told = [tmp_path / f"told-{index}" for index in (0, 1)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in told), 30, process.poll)
        pids = [int(path.read_text().split()[0]) for path in told]
        hosts.set_link(USER, "down")
        seconds = wait_for(lambda: not any(map(is_running, pids)), 20, lambda: pids)
        assert seconds > 2
    finally:
        process.kill()
        process.communicate()
        hosts.set_link(USER, "up")
