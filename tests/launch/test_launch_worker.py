"""What runs on each host: its processes, its life line, and what hosts and loop tell each other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from pids import is_running
from programs import ROOT

from launch import coordinates, nodes, worker
from launch.job import Job, LaunchError
from launch.loop import Loop, Place
from launch.nodes import Node
from launch.processes import Start

# Other tests of this process may have started JAX, which warns of every fork; what is forked here becomes another
# program at once.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items()}]))"
LISTEN = """
import signal, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: (print("heard", number, flush=True), sys.exit(4)))
print("listening", flush=True)
time.sleep(60)
"""
GREETING = {"environment": {"FROM_HOME": "a 'b' $(c)"}}


@contextlib.contextmanager
def started(logs, *words, options=(), env=None):
    """A worker whose standard input is ours; it is killed at the end, and its processes with it."""
    command = [sys.executable, "-m", "launch.worker", f"--logs={logs}", "--grace-s", "0.5", *options, "--", *words]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MTX_")}
    process = subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**inherited, "PYTHONPATH": str(ROOT), **(env or {})}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):  # what was not read
                pipe.close()


def end(process, code, timeout=20):
    """Its output, after it has ended with this code; its standard input stays as it is."""
    found = process.wait(timeout=timeout)
    said = process.stderr.read().decode()
    assert (found, "Traceback" in said) == (code, False), said
    return process.stdout.read().decode(), said


def tell(process, text):
    process.stdin.write(text.encode())
    process.stdin.flush()


def wait_until_listening(logs, name="0"):
    deadline = time.monotonic() + 20
    while not (logs / f"{name}.log").exists() or b"listening" not in (logs / f"{name}.log").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_shown(path):
    words, environment = json.loads(path.read_text())
    return words, environment


def test_processes_of_a_host(tmp_path):
    logs = tmp_path / "logs/1"
    hostile = ["a b", "$(touch x)", "'", "-x\ny", "--", ""]
    options = ["--nodes", "3", "--node", "1", "--processes-per-node", "2", "--coordinator", "h0:77"]
    with started(logs, sys.executable, "-c", SHOW, *hostile, options=options) as process:
        shown, _ = end(process, 0)
    host = socket.gethostname()
    assert sorted(line.partition(" ")[0] for line in shown.splitlines()) == [f"[2@{host}]", f"[3@{host}]"]
    for rank in (2, 3):
        words, environment = read_shown(logs / f"{rank}.log")
        assert words == hostile
        told = {key: value for key, value in environment.items() if key.startswith("MTX_")}
        assert told["MTX_COORDINATOR"] == "h0:77"
        assert (told["MTX_NUM_PROCESSES"], told["MTX_PROCESS_ID"]) == ("6", str(rank))
        assert "PYTHONPATH" not in environment
    node = nodes.read_nodes(logs)[1]
    assert (node.host, node.processes, node.codes, node.own) == (host, [2, 3], [0, 0], [0, 0])
    assert sorted(path.name for path in logs.iterdir()) == ["2.log", "3.log", "node-1.json"]


def test_only_what_a_target_has_added_is_taken_from_the_path():
    root = str(Path(worker.__file__).parents[1])
    for before, after in (
        (f"{root}:/a:/b", {"PYTHONPATH": "/a:/b"}), (root, {}), ("/a", {"PYTHONPATH": "/a"}),
        (f"/a:{root}", {"PYTHONPATH": f"/a:{root}"}),
    ):  # fmt: skip
        environment = {"PYTHONPATH": before}
        worker.forget_path(environment)
        assert environment == after
    environment = {}
    worker.forget_path(environment)
    assert environment == {}


FAILS = "import os, sys, time; time.sleep(3 * int(os.environ['MTX_PROCESS_ID'])); sys.exit(3)"


def test_the_exit_code_tells_what_happened(tmp_path):
    options = ["--nodes", "1", "--node", "0", "--processes-per-node", "2", "--coordinator", "h:1"]
    with started(tmp_path, sys.executable, "-c", FAILS, options=options) as process:
        _, said = end(process, 3)
    assert "process 1 is still there" in said
    node = nodes.read_nodes(tmp_path)[0]
    assert (node.codes, node.own) == ([3, -15], [3])


@pytest.mark.parametrize(("options", "message"), [
    (["--nodes", "2", "--node-variable", "WHICH"], "WHICH = '2': a number from 0 to 1 says which of the hosts"),
    (["--nodes", "2", "--node-variable", "NONE"], "NONE = '': a number from 0 to 1"),
    (["--node", "0", "--life-line", "1"], "the launcher said nothing for 1 s"),
])  # fmt: skip
def test_mistakes_name_the_host(tmp_path, options, message):
    with started(tmp_path / "logs", "true", options=options, env={"WHICH": "2"}) as process:
        _, said = end(process, 2)
    assert f"launch: host {socket.gethostname()}: " in said
    assert message in said
    assert not (tmp_path / "logs").exists()


def test_a_program_that_is_not_there(tmp_path):
    with started(tmp_path, "no-such-program", options=["--node", "0"]) as process:
        assert "no-such-program: No such file or directory" in end(process, 2)[1]


@pytest.mark.parametrize("text", ["\n", "[]\n", "{}\n", '{"environment"\n', "hello", '{"environment": 3}\n'])
def test_what_is_no_greeting(tmp_path, text):
    with started(tmp_path, "true", options=["--node", "0", "--life-line", "20"]) as process:
        tell(process, text)
        process.stdin.close()
        assert "no greeting of a launcher" in end(process, 2)[1]


def test_environment_comes_over_the_life_line(tmp_path):
    options = ["--node", "0", "--life-line", "20"]
    with started(tmp_path, sys.executable, "-c", SHOW, options=options) as process:
        tell(process, json.dumps(GREETING) + "\n")
        end(process, 0)
    assert read_shown(tmp_path / "0.log")[1]["FROM_HOME"] == "a 'b' $(c)"


@pytest.mark.parametrize(("name", "heard"), [("SIGTERM", 15), ("SIGINT", 15), ("SIGUSR1", 10)])
def test_signals_come_over_the_life_line(tmp_path, name, heard):
    options = ["--node", "0", "--life-line", "20"]
    with started(tmp_path, sys.executable, "-c", LISTEN, options=options) as process:
        tell(process, json.dumps(GREETING) + "\nNOISE\n\n")
        wait_until_listening(tmp_path)
        tell(process, name[:4])  # in two pieces
        time.sleep(0.1)
        tell(process, f"{name[4:]}\n{name}\n")
        end(process, 4)
    assert (tmp_path / "0.log").read_text() == f"listening\nheard {heard}\n"


def test_signals_to_the_worker_are_passed_on(tmp_path):
    with started(tmp_path, sys.executable, "-c", LISTEN, options=["--node", "0"]) as process:
        wait_until_listening(tmp_path)
        process.send_signal(signal.SIGUSR1)
        end(process, 4)
    assert "heard 10" in (tmp_path / "0.log").read_text()


def test_a_lost_launcher_lets_the_processes_save(tmp_path):
    options = ["--node", "0", "--life-line", "20"]
    with started(tmp_path, sys.executable, "-c", LISTEN, options=options) as process:
        tell(process, json.dumps(GREETING) + "\n")
        wait_until_listening(tmp_path)
        process.stdin.close()
        said = end(process, 4)[1]
    assert f"host {socket.gethostname()}: the launcher has gone; its processes are ended" in said
    assert "heard 15" in (tmp_path / "0.log").read_text()


def test_silence_ends_the_processes_whatever_they_do(tmp_path):
    options = ["--node", "0", "--life-line", "2"]
    with started(tmp_path, sys.executable, "-c", LISTEN, "deaf", options=options) as process:
        tell(process, json.dumps(GREETING) + "\n")
        wait_until_listening(tmp_path)
        for _ in range(3):  # longer than the life line
            time.sleep(1)
            tell(process, "\n")
        assert process.poll() is None
        said = end(process, 137)[1]
    assert "no word of the launcher for 2 s" in said
    assert nodes.read_nodes(tmp_path)[0].codes == [-9]


def test_a_killed_worker_takes_its_processes_along(tmp_path):
    with started(tmp_path, sys.executable, "-c", LISTEN, "deaf", options=["--node", "0"]) as process:
        wait_until_listening(tmp_path)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
    assert len(children) == 1
    deadline = time.monotonic() + 10
    while is_running(int(children[0])):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_probe(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert worker.main(["--probe"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["host"], said["address"], said["gpus"]) == (socket.gethostname(), "127.0.0.1", ["3", "4"])
    assert abs(said["time"] - time.time()) < 10
    assert 0 < said["port"] < 1 << 16
    assert worker.main(["--probe", "no-such-host.invalid"]) == 2
    assert "it must resolve and have a route" in capsys.readouterr().err


def announce(logs, index, codes=None, own=None):
    nodes.announce(logs, Node(index, f"h{index}", 1, 0.0, [2 * index, 2 * index + 1], codes, own))


def test_trouble_of_hosts(tmp_path):
    hosts = [f"h{index}" for index in range(12)]

    def trouble(seconds):
        return nodes.find_trouble(tmp_path, hosts, seconds, 30.0)

    assert trouble(30.0) is None
    announce(tmp_path, 0)
    announce(tmp_path, 3, [0, 4], [0, 4])
    assert trouble(30.0) is None
    assert trouble(30.1) == (
        f"10 of 12 hosts have not begun after 30 s: h1, h2, h4, h5, h6, h7, h8, h9 and 2 more; look whether they are "
        f"up and see {tmp_path}"
    )
    for index in range(12):
        announce(tmp_path, index)
    assert trouble(1e6) is None
    announce(tmp_path, 7, [6, -9], [6])
    assert trouble(0.0) == "host h7: of processes 14-15, 2 failed"
    assert nodes.own_codes(tmp_path) == [6]
    assert {path.name for path in tmp_path.iterdir()} == {f"node-{index}.json" for index in range(12)}


def test_addresses():
    assert coordinates.join_address("10.0.0.1", 5) == "10.0.0.1:5"
    assert coordinates.join_address("fd00::1", 5) == "[fd00::1]:5"
    assert coordinates.address_towards([]) == coordinates.address_towards(["127.0.0.9"]) == "127.0.0.1"
    with pytest.raises(LaunchError, match=r"host no-such-host\.invalid: .*; it must resolve and have a route"):
        coordinates.address_towards(["no-such-host.invalid"])
    for host in ("127.0.0.1", ""):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", coordinates.free_port(host)))


def test_shares_of_gpus():
    def job(per_node, gpus):
        return Job(("x",), "r", num_nodes=2, processes_per_node=per_node, gpus_per_node=gpus)

    def share(per_node, gpus, there, local=1):
        return coordinates.visible_gpus(job(per_node, gpus), local, [f"g{n}" for n in range(there)])

    assert share(8, 8, 8) == {"CUDA_VISIBLE_DEVICES": "g1"}
    assert share(2, 4, 8) == {"CUDA_VISIBLE_DEVICES": "g2,g3"}
    assert share(1, 4, 8, local=0) == {"CUDA_VISIBLE_DEVICES": "g0,g1,g2,g3"}
    assert share(1, None, 8, local=0) == share(2, 0, 8) == share(2, None, 0) == {}
    with pytest.raises(LaunchError, match="shows 3 GPUs and the job wants 4 of each host"):
        share(2, 4, 3)
    with pytest.raises(LaunchError, match="3 processes cannot share 4 GPUs evenly"):
        share(3, 4, 4)
    with pytest.raises(LaunchError, match="2 processes cannot share 1 GPUs evenly"):
        share(2, None, 1)


class Failing(Place):
    """A place where every attempt ends with exit code 1."""

    def starts(self, command, logs):
        return [Start(words=command, environment=dict(os.environ), name="0")]


@pytest.mark.parametrize(("carries_on", "attempts"), [(False, 3), (True, 1)])
def test_failures_of_a_loop_before_count_where_a_scheduler_started_it_again(tmp_path, carries_on, attempts):
    command = (sys.executable, "-c", "raise SystemExit(1)")
    job = Job(command, str(tmp_path), max_restarts=2, backoff_s=0.01)
    record = tmp_path / "launch.jsonl"
    events = [
        {"event": "started"}, {"event": "ended", "newest_step": None, "failures": 1},
        {"event": "started"},  # its loop was lost as well
    ]  # fmt: skip
    record.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    record.write_text(record.read_text() + "\n")
    assert Loop(job, Failing(), carries_on=carries_on).run() == 1
    written = [json.loads(line) for line in record.read_text().splitlines()[4:]]
    assert [event["event"] for event in written] == ["started", "ended"] * attempts
    assert "given up: 3 attempts in a row" in written[-1]["reason"]


def test_a_checkpoint_since_clears_the_failures(tmp_path):
    event = {"event": "ended", "newest_step": 4, "failures": 3}
    (tmp_path / "launch.jsonl").write_text(json.dumps({"event": "started"}) + "\n" + json.dumps(event) + "\n")
    (tmp_path / "checkpoints/8").mkdir(parents=True)
    (tmp_path / "checkpoints/8/manifest.json").touch()
    job = Job((sys.executable, "-c", "raise SystemExit(1)"), str(tmp_path), max_restarts=2, backoff_s=0.01)
    assert Loop(job, Failing(), carries_on=True).run() == 1
    assert len((tmp_path / "launch.jsonl").read_text().splitlines()) == 2 + 2 * 3
