"""Lists of hosts, and what would be started on them."""

import shlex
import subprocess
import sys

import pytest
from programs import ROOT

from launch import remote
from launch.job import LaunchError
from launch.remote import SshJob
from launch.targets import ssh

GOLDEN = ROOT / "tests/golden/launch"


def make_job(**fields):
    """A job of two hosts with names and values that a shell would take for more."""
    given = {
        "command": ("mtx", "train", "a b.gin", "--run-dir", "/runs/$(x) 'y'\nz"), "run_dir": "/runs/$(x) 'y'\nz",
        "working_directory": "/home/me/my $dir", "num_nodes": 2, "processes_per_node": 8, "gpus_per_node": 8,
        "environment": (("TOKEN", "swordfish"),), "python": "/env/bin/python", "hosts": ("gpu01", "me@fe80::2"),
        "slots": (1, 1), "ssh_config": "my config", "ssh_options": ("Port=2222",),
    }  # fmt: skip
    return SshJob(**{**given, **fields})


def test_rendered(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = ssh.render(make_job()).replace(str(ROOT), "ROOT") + "\n"
    assert text == (GOLDEN / "ssh_two.txt").read_text()
    assert "swordfish" not in text


def test_rendered_words_are_those_of_the_command(monkeypatch):
    """What a shell makes of the line, and the remote shell of its last word."""
    monkeypatch.setenv("PYTHONPATH", "/a b:/c")
    job = make_job()
    remote_text = ssh.worker_command(job, 1, "[fe80::1]:5", "/logs/$1 'x'", job.process_command)
    change, words = remote_text.split(" && ")
    assert shlex.split(change) == ["cd", "/home/me/my $dir"]
    told = shlex.split(words)
    assert told[:6] == ["exec", "env", f"PYTHONPATH={ROOT}:/a b:/c", "/env/bin/python", "-m", "launch.worker"]
    assert told[told.index("--") + 1 :] == list(job.command)
    assert "--logs=/logs/$1 'x'" in told
    for shell in ("sh", "bash"):
        show = words.replace("exec env", "printf '%s\\0'", 1)
        shown = subprocess.run([shell, "-c", show], capture_output=True, text=True, check=True).stdout
        assert shown.split("\0")[:-1] == told[2:]


def test_users_options_come_first():
    words = remote.ssh_words(make_job(ssh_options=("ConnectTimeout=99",)), "h")
    assert words.index("ConnectTimeout=99") < words.index("ConnectTimeout=10")
    assert words[-2:] == ["--", "h"]


def test_hosts_of_an_array_in_turn(monkeypatch):
    job = make_job(slots=(2, 1), tasks=4)
    assert [words[-1] for words in ssh.slots(job)] == ["gpu01", "me@fe80::2", "gpu01"]
    assert len(ssh.slots(make_job(slots=(2, 1), tasks=4, parallel=2))) == 2
    assert "# tasks at a time: 2 on gpu01, 1 on me@fe80::2\nmtx train" in ssh.render(job)


@pytest.mark.parametrize(("text", "hosts"), [
    ("gpu[01-03],x", ["gpu01", "gpu02", "gpu03", "x"]),
    ("me@gpu[1-2,7]-ib.site", ["me@gpu1-ib.site", "me@gpu2-ib.site", "me@gpu7-ib.site"]),
    ("[::1],me@fe80::2%eth0, 10.0.0.1", ["::1", "me@fe80::2%eth0", "10.0.0.1"]),
])  # fmt: skip
def test_lists_of_hosts(text, hosts):
    assert ssh.parse_hosts(text, "--hosts") == hosts


@pytest.mark.parametrize("text", [
    "-oProxyCommand=x", "a,-b", "me@-x", "-l@x", "a b;c", "$(a)", "a\nb'", "", ",", "a,b,a", "a[1-2],a1", "a@b@c",
    "[x]",
])  # fmt: skip
def test_no_hosts(text):
    with pytest.raises(LaunchError, match="host"):
        ssh.parse_hosts(text, "--hosts")


def test_host_file():
    text = "# all\n\ngpu[1-2] slots=8  # new ones\n me@big slots=4\n[::1]\n"
    assert ssh.read_hosts(text, "x") == (["gpu1", "gpu2", "me@big", "::1"], [8, 8, 4, 1])


@pytest.mark.parametrize(("text", "message"), [
    ("a\nb slot=3", "x, line 2: 'slot=3'"),
    ("a slots=0", "'slots=0'"),
    ("a\n\na", "x: a: there twice"),
    ("# none", "x: it names no host"),
    ("a\n-b", "x, line 2|-b"),
])  # fmt: skip
def test_no_host_file(text, message):
    with pytest.raises(LaunchError, match=message):
        ssh.read_hosts(text, "x")


def launch(*words):
    return subprocess.run(
        [sys.executable, "-m", "launch", "ssh", *words, "--", "mtx", "train", "a.gin", "--run-dir", "x"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_slots_are_processes(tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    done = launch("--host-file", str(tmp_path / "hosts"), "--dry-run")
    assert done.stdout.count("--processes-per-node 4") == 2, done.stderr
    (tmp_path / "hosts").write_text("a slots=4\nb\n")
    done = launch("--host-file", str(tmp_path / "hosts"), "--dry-run")
    assert (done.returncode, "1 to 4 slots" in done.stderr) == (2, True)


@pytest.mark.parametrize(("words", "message"), [
    (["--hosts", "a", "--life-line-s", "1"], "--life-line-s 1.0: 5 or more"),
    (["--host-file", "/nowhere/hosts"], "--host-file /nowhere/hosts: No such file or directory\n"),
    (["--host-file", sys.executable], f"--host-file {sys.executable}: no text: "),
    (["--hosts=-a"], "'-a'"),
    ([], "python -m launch ssh: error: one of the arguments --hosts --host-file is required"),
])  # fmt: skip
def test_mistakes(words, message):
    done = launch(*words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr
