"""`mtx doctor --cluster` in real processes: one, two, some that never come, four hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from programs import ROOT, environment, free_port

from mtx.cli import main
from mtx.commands.doctor import describe
from mtx.health.cluster import Examination
from mtx.health.cluster_judge import Finding, Links, Report

NEEDS = ("unshare", "ip", "mount")


def doctor(folders, *options, count=None, cache="", program=(sys.executable,)):
    """Runs a process for each folder; exit codes and outputs. With `count`, more are said to come than do."""
    env = environment(1, MTX_COMPILATION_CACHE=str(cache))
    count = count or len(folders)
    if count > 1:
        env |= {"MTX_COORDINATOR": f"127.0.0.1:{free_port()}", "MTX_NUM_PROCESSES": str(count)}
    with ExitStack() as stack:
        processes = []
        for index, folder in enumerate(folders):
            words = [*program, "-m", "mtx", "doctor", "--cluster", "--run-dir", str(folder), "--json", *options]
            own = {**env, "MTX_PROCESS_ID": str(index)} if count > 1 else env
            process = subprocess.Popen(
                words, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        outputs = [process.communicate(timeout=100) for process in processes]
    return [process.returncode for process in processes], outputs


def test_one_process(tmp_path):
    codes, outputs = doctor([tmp_path / "run"])
    answer = json.loads(outputs[0][0])
    assert codes == [0 if answer["ok"] else 2]
    (report,) = answer["reports"]
    assert report["host"] == socket.gethostname()
    assert report["facts"]["devices"] == "1 x cpu"
    assert report["skew_s"] == 0
    assert report["free_disk"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert all(0 < rate < 1e6 for rate in report["rates"][0].values())
    assert answer["links"] == {"within": {}, "between": []}
    assert list((tmp_path / "run").iterdir()) == []


def test_two_processes_share_a_directory(tmp_path):
    codes, outputs = doctor([tmp_path, tmp_path])
    answer = json.loads(outputs[0][0])
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""
    assert [report["process"] for report in answer["reports"]] == [0, 1]
    assert all(abs(report["skew_s"]) < 1 for report in answer["reports"])
    assert answer["links"]["within"][socket.gethostname()] > 0
    assert answer["findings"] == []
    assert list(tmp_path.iterdir()) == []


def test_two_processes_with_a_directory_each(tmp_path):
    codes, outputs = doctor([tmp_path / "a", tmp_path / "b"])
    assert codes == [2, 2]
    (finding,) = json.loads(outputs[0][0])["findings"]
    assert finding["what"] == "run directory"
    assert f"{tmp_path / 'b'} is not the folder that process 0 sees" in finding["fault"]


def test_different_flags(tmp_path):
    script = 'test $MTX_PROCESS_ID = 0 || export XLA_FLAGS="$XLA_FLAGS --xla_cpu_enable_fast_math=false"; '
    codes, outputs = doctor([tmp_path] * 2, program=("sh", "-c", f'{script}exec "$0" "$@"', sys.executable))
    assert codes == [2, 2]
    answer = json.loads(outputs[0][0])
    assert [finding["what"] for finding in answer["findings"]] == ["XLA_FLAGS"]
    assert answer["reports"][0]["rates"] == []


def test_a_process_that_never_comes(tmp_path):
    codes, outputs = doctor([tmp_path, tmp_path], "--timeout-s", "6", count=3)
    assert codes == [2, 2]
    assert json.loads(outputs[0][0])["exit_code"] == 2
    for _, errors in outputs:
        assert "1 of 3 processes have not begun, or see another run directory: 2" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("time.sleep(1000)", "not done in 8 s; at 'measuring its devices': process 1 on "),
        ("(_ for _ in ()).throw(RuntimeError('out of memory'))", "measuring its devices: out of memory"),
    ],
)
def test_a_process_that_does_not_come_through(tmp_path, fault, message):
    program = (
        "import os, sys, time; from mtx.cli import main; from mtx.health import cluster_speed\n"
        f"if os.environ['MTX_PROCESS_ID'] == '1': cluster_speed.measure_devices = lambda: {fault}\n"
        "sys.exit(main(sys.argv[3:]))"
    )
    begin = time.monotonic()
    codes, outputs = doctor([tmp_path] * 2, "--timeout-s", "8", program=(sys.executable, "-c", program))
    assert codes == [2, 2]
    assert time.monotonic() - begin < 40
    assert message in json.loads(outputs[0][0])["error"]
    assert "process 1" in outputs[0][1]
    assert message in outputs[1][1]


def test_of_many_hosts_only_those_that_something_is_wrong_with_are_shown():
    reports = [
        Report(process=i, host=f"h{i}", platform="gpu", facts={}, rates=[{"matmul_tflops": 7.0, "memory_gbs": 3.0}])
        for i in range(280)
    ]
    bad = Finding(what="network", hosts=["h77"], fault="slow", cure="leave it out")
    found = Examination(ok=False, reports=reports, links=Links(), findings=[bad], seconds={"telling": 1.0})
    lines = describe(found)
    assert [line.split()[0] for line in lines[:2]] == ["host", "h77"]
    assert lines[2:5] == ["279 more of 280 hosts", "! h77: network: slow", "  cure: leave it out"]
    assert lines[5].startswith("1 fault; 280 hosts, 280 processes")
    assert len(lines) == 6
    assert describe(found, quiet=True) == lines[3:5]
    few = dataclasses.replace(found, reports=reports[:3], findings=[])
    assert [line.split()[0] for line in describe(few)] == ["host", "h0", "h1", "h2", "nothing"]


def test_process_0_never_comes(tmp_path, monkeypatch, capsys):
    for name, value in {"COORDINATOR": f"127.0.0.1:{free_port()}", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"MTX_{name}", value)
    assert main(["doctor", "--cluster", "--run-dir", str(tmp_path), "--timeout-s", "1"]) == 2
    assert "cannot reach process 0 at 127.0.0.1" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--cluster", "--run-dir", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_options_of_a_cluster_alone_are_refused(capsys):
    assert main(["doctor", "--run-dir", "x"]) == 2
    assert "--cluster" in capsys.readouterr().err


def test_four_hosts(tmp_path):
    """Names and a network of their own: pairs of neighbours in two rounds."""
    probe = ["unshare", "--net", "--uts", "--mount", "true"]
    if not all(map(shutil.which, NEEDS)) or os.geteuid() or subprocess.run(probe, capture_output=True).returncode:
        assert os.environ.get("MTX_TEST_SERVICES") != "required"
        pytest.skip("network and host names of its own need root, unshare and ip")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.9.1 h0 h1 h2 h3\n")
    (tmp_path / "test.sh").write_text(
        f"ip link set lo up && ip addr add 10.77.9.1/32 dev lo || exit 8\n"
        f'mount --bind "{tmp_path}/hosts" /etc/hosts || exit 9\n'
        "for i in 0 1 2 3; do\n"
        '  MTX_PROCESS_ID=$i unshare --uts sh -c \'hostname "h$0"; exec "$@"\' $i "$@" & pids="$pids $!"\n'
        "done\n"
        "for pid in $pids; do wait $pid || exit; done\n"
    )
    env = environment(1, MTX_COMPILATION_CACHE="", MTX_COORDINATOR="10.77.9.1:7801", MTX_NUM_PROCESSES="4")
    command = ["-m", "mtx", "doctor", "--cluster", "--run-dir", str(tmp_path / "run"), "--json"]
    names = ["unshare", "--net", "--mount", "--propagation", "private", "sh", str(tmp_path / "test.sh")]
    done = subprocess.run(
        [*names, sys.executable, *command], env=env, capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    pairs = {(first, second) for first, second, bandwidth in answer["links"]["between"] if bandwidth > 0}
    assert pairs == {("h0", "h1"), ("h1", "h2"), ("h2", "h3"), ("h3", "h0")}
    assert [report["host"] for report in answer["reports"]] == ["h0", "h1", "h2", "h3"]
    assert not any(finding["is_fault"] for finding in answer["findings"])


SLOW_HOST = """
begin() { ip netns add "$X$1" && ip -n "$X$1" link set lo up; }
end() { for i in w 1 2 3 4; do ip netns del "$X$i"; done; }
trap end EXIT
begin w && ip -n "${X}w" link add br0 type bridge && ip -n "${X}w" link set br0 up || exit 9
for i in 1 2 3 4; do
  begin $i && ip link add e0 netns "$X$i" type veth peer name p$i netns "${X}w" || exit 9
  ip -n "${X}w" link set p$i master br0 up && ip -n "$X$i" addr add 10.78.0.$i/24 dev e0 || exit 9
  ip -n "$X$i" link set e0 up && echo "10.78.0.$i h$i" >> "$HOSTS" || exit 9
done
ip netns exec "${X}2" tc qdisc add dev e0 root tbf rate 100mbit burst 64kb latency 400ms || exit 9
for i in 1 2 3 4; do
  MTX_PROCESS_ID=$((i - 1)) nsenter "--net=/run/netns/$X$i" unshare --uts --mount --propagation private sh -c \
    'hostname "h$0" && mount --bind "$HOSTS" /etc/hosts && exec timeout -k 5 120 "$@"' $i "$@" & pids="$pids $!"
done
for pid in $pids; do wait $pid || exit; done
"""
"""Four hosts at a switch, each in a network namespace, of which h2 sends 100 Mbit/s."""


@pytest.mark.slow
def test_a_host_with_a_slow_link(tmp_path):
    limit = "ip link set lo up && tc qdisc add dev lo root tbf rate 1mbit burst 9kb latency 9ms"
    probe = ["unshare", "--net", "sh", "-c", limit]
    needs = all(map(shutil.which, (*NEEDS, "tc", "nsenter"))) and not os.geteuid()
    if not needs or subprocess.run(probe, capture_output=True).returncode:
        assert os.environ.get("MTX_TEST_SERVICES") != "required"
        pytest.skip("networks of its own need root, nsenter, ip, and tc with tbf in the kernel")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    env = environment(1, MTX_COMPILATION_CACHE="", MTX_COORDINATOR="10.78.0.1:7801", MTX_NUM_PROCESSES="4")
    env |= {"X": f"doctor{os.getpid()}-", "HOSTS": str(tmp_path / "hosts")}
    command = [sys.executable, "-m", "mtx", "doctor", "--cluster", "--run-dir", str(tmp_path / "run"), "--json"]
    script = ["bash", "-c", SLOW_HOST, "bash", *command]
    done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    slow = [bandwidth for first, second, bandwidth in answer["links"]["between"] if "h2" in (first, second)]
    assert len(slow) == 2
    assert max(slow) < 0.025  # twice 100 Mbit/s: it may send 64 kB at once
    (finding,) = [finding for finding in answer["findings"] if finding["what"] == "network"]
    assert finding["hosts"] == ["h2"]
