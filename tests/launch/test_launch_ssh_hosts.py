"""Jobs on two hosts with real ssh servers, with small programs in place of a run, and one real run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from commands.conftest import Workplace, straight, workplace
from pids import is_running
from programs import ROOT, free_port
from ssh_hosts import Servers, servers

from launch.remote import SshJob
from launch.targets import ssh

# As in test_launch_local.py: the n-th attempt of process i does the n-th word of its script.
CHILD = """
import json, os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[2]), os.environ["MTX_PROCESS_ID"]
with (folder / f"pids-{index}").open("a") as file:
    file.write(f"{os.getpid()}\\n")
words = sys.argv[3 + int(index)].split(",")
word = words[min(len((folder / f"pids-{index}").read_text().split()), len(words)) - 1]
(folder / f"seen-{index}.json").write_text(json.dumps({"argv": sys.argv, "environ": dict(os.environ)}))
print("process", index, "does", word, flush=True)
if word in ("listen", "deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN if word == "deaf" else lambda *_: sys.exit(4))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))
    print("listening", flush=True)
    time.sleep(60)
    sys.exit(1)
if word == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
sys.exit(int(word))
"""


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory, monkeypatch):
    """Where names of jobs are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def words(servers, folder, *scripts, hosts="h[1-2]", **options):
    flags = {"grace-s": 1, "backoff-s": 0.1, "life-line-s": 5, "ssh-config": servers.config, **options}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", CHILD, "--run-dir", str(folder), *scripts]
    return [sys.executable, "-m", "launch", "ssh", "--hosts", hosts, *given, "--", *command]


def launch(*args, env=None, **options):
    command = words(*args, **options)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, **(env or {})}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextmanager
def launched(*args, **options):
    """A job whose processes all listen."""
    with subprocess.Popen(
        words(*args, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            heard = 0
            while heard < 2:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                heard += "listening" in line
            yield process
        finally:
            process.kill()


def pids(folder, index=None):
    names = ["pids-0", "pids-1"] if index is None else [f"pids-{index}"]
    return [int(pid) for name in names for pid in (folder / name).read_text().split()]


def seconds_until_ended(process_ids):
    begin = time.monotonic()
    while any(map(is_running, process_ids)):
        assert time.monotonic() < begin + 60
        time.sleep(0.05)
    return time.monotonic() - begin


def seen(folder, index):
    return json.loads((folder / f"seen-{index}.json").read_text())


def test_both_hosts_run_it(servers, tmp_path):
    done = launch(servers, tmp_path, "0", "0")
    assert done.returncode == 0, done.stderr
    name = os.uname().nodename
    assert sorted(done.stdout.splitlines()) == [f"[0@{name}] process 0 does 0", f"[1@{name}] process 1 does 0"]
    assert (tmp_path / "logs/1/1.log").read_text() == "process 1 does 0\n"
    one, other = (seen(tmp_path, index)["environ"] for index in (0, 1))
    assert one["MTX_COORDINATOR"] == other["MTX_COORDINATOR"]
    assert (one["MTX_NUM_PROCESSES"], other["MTX_PROCESS_ID"]) == ("2", "1")
    assert one["SSH_CONNECTION"].split()[2] == "127.0.0.1"
    assert other["SSH_CONNECTION"].split()[2] == "127.0.0.2"


def test_hostile_names_arrive_unharmed(servers, tmp_path):
    folder = tmp_path / "a $(touch hit) 'b\" `touch hit`\n;touch hit #"
    folder.mkdir()
    value = "x $(touch hit) 'y\"\n`touch hit`; touch hit & \\"
    done = launch(servers, folder, "0", "0", "--$HOME $(touch hit)\n'", env={"MTX_HOSTILE": value, "OTHER": "1"})
    assert done.returncode == 0, done.stderr
    for index in (0, 1):
        told = seen(folder, index)
        assert told["argv"][1:] == ["--run-dir", str(folder), "0", "0", "--$HOME $(touch hit)\n'"]
        assert told["environ"]["MTX_HOSTILE"] == value
        assert "OTHER" not in told["environ"]
        assert told["environ"].get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    assert not (ROOT / "hit").exists()


def test_values_of_the_environment_are_on_no_command_line(servers, tmp_path):
    os.environ["MTX_SECRET"] = "swordfish-7341"
    try:
        with launched(servers, tmp_path, "listen", "listen") as process:
            lines = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
            assert "launch.worker" in lines
            assert "swordfish-7341" not in lines
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 4
    finally:
        del os.environ["MTX_SECRET"]
    assert seen(tmp_path, 1)["environ"]["MTX_SECRET"] == "swordfish-7341"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_the_processes(servers, tmp_path, number):
    with launched(servers, tmp_path, "listen", "listen") as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == 4
    assert not any(map(is_running, pids(tmp_path)))


@pytest.mark.parametrize("script", ["listen", "deaf"])
def test_killed_launcher_takes_its_processes_along(servers, tmp_path, script):
    with launched(servers, tmp_path, script, script) as process:
        assert all(map(is_running, pids(tmp_path)))
        process.kill()
        process.wait(timeout=20)
        assert seconds_until_ended(pids(tmp_path)) < 10


def test_failed_process_is_started_again(servers, tmp_path):
    done = launch(servers, tmp_path, "listen,0", "1,0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/2/0.log").read_text() == "process 0 does 0\n"


def test_users_mistake_ends_it(servers, tmp_path):
    assert launch(servers, tmp_path, "listen", "2").returncode == 2


def test_lost_worker_is_named_and_nothing_of_it_is_left(servers, tmp_path):
    done = launch(servers, tmp_path, "listen,0", "orphan,0")
    assert done.returncode == 0, done.stderr
    assert "host h2" in done.stderr
    assert "was lost" in done.stderr
    first, _ = pids(tmp_path, 1)
    assert not is_running(first)


def test_next_launcher_waits_for_what_still_runs(servers, tmp_path):
    """The first one is killed, and its deaf processes take a while to end."""
    with launched(servers, tmp_path, "deaf,0", "deaf,0", **{"grace-s": 3}) as process:
        first = pids(tmp_path)
        process.kill()
        process.wait(timeout=20)
        done = launch(servers, tmp_path, "deaf,0", "deaf,0", **{"grace-s": 3})
        assert done.returncode == 0, done.stderr
        assert "of the last attempt still runs there" in done.stderr
        assert not any(map(is_running, first))


def test_detached_job_outlives_its_terminal(servers, tmp_path):
    command = words(servers, tmp_path, "listen", "listen")
    split = command.index("--")
    done = subprocess.run(
        [*command[:split], "--detach", *command[split:]], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (loop,) = map(int, re.findall(r"goes on as process (\d+)", done.stdout))
    log = tmp_path / "logs/launch-1.log"
    deadline = time.monotonic() + 30
    while log.read_text().count("] listening") < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert os.getsid(loop) == loop
    os.kill(loop, signal.SIGTERM)
    seconds_until_ended([loop, *pids(tmp_path)])
    assert "stopped as asked; ends with exit code 4" in log.read_text()


def test_slot_runs_a_command_on_its_host(servers, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x 'y'")
    job = SshJob(
        command=("mtx",), run_dir=str(tmp_path), hosts=("h2",), slots=(1,), ssh_config=str(servers.config),
        python=sys.executable, working_directory=str(tmp_path), environment=(("SECRET", "x 'y'"),), grace_s=1.0,
    )  # fmt: skip
    (slot,) = ssh.slots(job)
    assert "x 'y'" not in slot
    code = (
        "import os, sys; print(os.environ['SSH_CONNECTION'].split()[2], os.environ['SECRET'], sys.argv[1]); sys.exit(3)"
    )
    done = subprocess.run([*slot, sys.executable, "-c", code, "$(a) b"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "127.0.0.2 x 'y' $(a) b\n"), done.stderr
    with subprocess.Popen(
        [*slot, "sleep", "60"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        nodes = tmp_path / "logs/hosts"
        deadline = time.monotonic() + 20
        while len(list(nodes.glob("*/node-0.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (worker,) = (
            node["pid"]
            for node in (json.loads(path.read_text()) for path in nodes.glob("*/node-0.json"))
            if node["codes"] is None
        )
        assert is_running(worker)
        process.kill()
    seconds_until_ended([worker])


def test_slot_names_a_host_that_is_lost(servers, tmp_path):
    job = SshJob(
        command=("mtx",), run_dir=str(tmp_path), hosts=("h2",), slots=(1,), ssh_config=str(servers.config),
        ssh_options=("PubkeyAuthentication=no",), python=sys.executable, working_directory=str(tmp_path),
    )  # fmt: skip
    (slot,) = ssh.slots(job)
    done = subprocess.run([*slot, "true"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6
    assert "host h2 was lost, or cannot be reached" in done.stderr


def test_wrong_host_key_is_final(servers, tmp_path):
    (tmp_path / "ssh").mkdir()
    key = tmp_path / "ssh/other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    known = servers.folder.joinpath("known_hosts").read_text().splitlines()
    (tmp_path / "known").write_text(f"{known[0]}\nh2 {(tmp_path / 'ssh/other.pub').read_text()}")
    done = launch(servers, tmp_path, "0", "0", **{"ssh-option": f"UserKnownHostsFile={tmp_path / 'known'}"})
    assert done.returncode == 2
    assert "host h2: Host key verification failed" in done.stderr
    assert "compare its key" in done.stderr


def test_refused_key_is_final(servers, tmp_path):
    done = launch(servers, tmp_path, "0", "0", **{"ssh-option": "PubkeyAuthentication=no"})
    assert done.returncode == 2
    assert "Permission denied" in done.stderr


def test_python_that_is_not_there_is_final(servers, tmp_path):
    done = launch(servers, tmp_path, "0", "0", python="/nowhere/python3")
    assert done.returncode == 2
    assert "/nowhere/python3 must be a Python 3.9 or newer there" in done.stderr


def test_unreachable_host_is_named(servers, tmp_path):
    config = tmp_path / "config"
    config.write_text(f"Include {servers.config}\nHost h3\n HostName 127.0.0.3\n Port {free_port()}\n")
    options = {"ssh-config": config, "start-timeout-s": 2}
    done = launch(servers, tmp_path, "0", "0", "0", hosts="h[1-3]", **options)
    assert done.returncode == 2
    assert "waits for 1 of 3 hosts: h3 (ssh: connect to host 127.0.0.3" in done.stderr
    assert "hosts do not answer within 2 s: h3" in done.stderr


def train(servers, workplace, name, *settings):
    """A training of two hosts with a device each."""
    options = ["--devices-per-process", "1", "--grace-s", "20", "--ssh-config", str(servers.config)]
    command = [word for word in workplace.command(name, *settings) if word not in ("--cpu-devices", "1")]
    words = [sys.executable, "-m", "launch", "ssh", "--hosts", "h1,h2", *options, "--", sys.executable, *command]
    environment = workplace.environment(XDG_STATE_HOME=os.environ["XDG_STATE_HOME"])
    return subprocess.Popen(
        words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_same_losses(workplace, name, straight):
    two, one = (
        [loss for _, validation, loss in workplace.losses(name) if validation is None] for name in (name, straight)
    )
    np.testing.assert_allclose(two, one, rtol=3e-5)


@pytest.mark.slow
def test_training_has_the_losses_of_one_process(servers, workplace, straight):
    with train(servers, workplace, "ssh-two") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same_losses(workplace, "ssh-two", straight)


@pytest.mark.slow
def test_stopped_training_saves_and_goes_on(servers, workplace, straight):
    name = "ssh-stopped"
    metrics = workplace.folder / name / "metrics.jsonl"
    slow = ["Train.eval_every = 1", "Train.eval_batches = 30"]
    with train(servers, workplace, name, *slow) as process:
        deadline = time.monotonic() + 150
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 4, output
    (preempted,) = workplace.events(name, "preempted")
    assert 3 <= preempted["step"] < 20
    with train(servers, workplace, name) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert [event["step"] for event in workplace.events(name, "resumed")] == [preempted["step"]]
    assert_same_losses(workplace, name, straight)


__all__ = ["Servers", "Workplace", "servers", "straight", "workplace"]
