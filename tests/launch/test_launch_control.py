"""Jobs by name: what they do, what they print, how they are stopped and repeated; small programs in place of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from programs import ROOT

from launch import control, job, logs, registry, stream
from launch.job import Job, LaunchError
from launch.registry import Record

LISTEN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: sys.exit(4))
print("listening", *sys.argv[1:], flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder / "mtx" / "jobs"


def launch(*words, cwd=ROOT, check=True, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-m", "launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=cwd, env=environment)
    assert "Traceback" not in done.stderr
    assert not check or done.returncode == 0, done.stderr
    return done


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def detached():
    """Starts a job that goes on without its terminal; what is left of it is killed."""
    names = []

    def start(folder, *words, processes=1, name="job"):
        names.append(name)
        options = ["--detach", "--name", name, "--run-dir", folder, "--processes", processes, "--grace-s", 0.5]
        said = launch("local", *options, "--", sys.executable, *words).stdout
        wait_for(lambda: (folder / "logs/1/all.log").exists() and (folder / "logs/1/all.log").read_bytes())
        return said

    yield start
    for name in names:
        launch("stop", "--kill", name)


def here(name="job", run_dir="/somewhere/run", **handle):
    return Record(name, "local", run_dir, {**registry.process_handle(), **handle}, time.time())


def put(record):
    registry.register(Job(("x",), record.run_dir, record.name), record.target, record.handle)
    return registry.find(record.name)


def test_a_job_is_found_by_name_and_by_run_directory(tmp_path, state_home):
    put(here(run_dir=str(tmp_path)))
    assert registry.find("job").run_dir == registry.find(str(tmp_path)).run_dir == str(tmp_path)
    assert stat.S_IMODE((state_home / "job.json").stat().st_mode) == 0o600
    assert [path.name for path in state_home.glob("*.json*")] == ["job.json"]
    with pytest.raises(LaunchError, match=r"'other' is neither a job's name nor a run directory.*known names: job"):
        registry.find("other")


def test_a_name_passes_on_when_its_job_has_ended():
    first = put(here())
    with pytest.raises(LaunchError, match=r"of the name job is there: running.*give --name another one"):
        put(here(pid=str(os.getppid()), started="other"))
    registry.close(Job(("x",), "/somewhere/run", "job"), first.handle, "exit code 0 (done)")
    assert registry.state(first) == "ended (exit code 0 (done))"
    second = put(here(pid=str(os.getppid()), started="other"))
    assert registry.find("job").handle == second.handle
    registry.close(Job(("x",), "/somewhere/run", "job"), first.handle, "exit code 1")
    assert registry.find("job").handle == second.handle  # it is not the first one's any more


def test_another_process_of_the_same_number_is_not_taken_for_the_job():
    record = here(started="another boot 17")
    assert registry.state(record).startswith("lost")
    with pytest.raises(LaunchError, match="nothing to stop"):
        registry.stop_process(record, signal.SIGTERM)
    assert registry.state(here()) == "running"


def test_a_job_of_another_host_is_left_to_that_host():
    record = put(here(host="login2"))
    assert registry.state(record) == f"unknown (its loop is process {os.getpid()} of host login2: ask there)"
    with pytest.raises(LaunchError, match=f"host login2 and this is {socket.gethostname()}; stop it there: `python"):
        registry.stop_process(record, signal.SIGTERM)
    with pytest.raises(LaunchError, match="if you know that it has gone, remove"):
        registry.refuse_taken("job")


def test_names_of_run_directories_that_are_called_alike(tmp_path):
    put(here("run", str(tmp_path / "a/run")))
    assert registry.with_free_name(Job(("x",), str(tmp_path / "b/run"), "run")).name == "run-2"
    assert registry.with_free_name(Job(("x",), str(tmp_path / "a/run"), "run")).name == "run"
    put(here("run-2", str(tmp_path / "c/run")))
    assert registry.with_free_name(Job(("x",), str(tmp_path / "b/run"), "run")).name == "run-3"


def test_a_state_folder_that_cannot_be_written_costs_the_name_only(tmp_path):
    (tmp_path / "file").touch()
    done = launch("local", "--run-dir", tmp_path / "r", "--", "true", XDG_STATE_HOME=str(tmp_path / "file"))
    assert "cannot be written (Not a directory): `stop` will not find this job" in done.stderr
    done = launch("status", tmp_path / "r", XDG_STATE_HOME=str(tmp_path / "file"))
    assert "unknown (no record of its launcher" in done.stdout
    assert "exit code 0 (done)" in done.stdout


def test_damaged_records_are_told(state_home):
    put(here())
    for name, text in (("a", "{"), ("b", "[1]"), ("c", '{"name": 1}')):
        (state_home / f"{name}.json").write_text(text)
    done = launch("status")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["name", "job"]
    assert done.stderr.count("no record of a job; remove it") == 3


def test_summary_of_a_run_directory(tmp_path):
    (tmp_path / "checkpoints/40").mkdir(parents=True)
    (tmp_path / "checkpoints/40/manifest.json").touch()
    lines = [{"step": 41, "loss": 3.5, "tokens": 9}, {"step": 41, "eval": "held", "loss": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')
    events = [
        {"event": "preflight"}, {"event": "started"}, {"event": "ended", "reason": "exit code 6"}, {"event": "started"},
    ]  # fmt: skip
    (tmp_path / "launch.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n{")
    found = control.summary(here(run_dir=str(tmp_path)))
    assert (found["step"], found["loss"], found["checkpoint"], found["attempts"]) == (41, 3.5, 40, 2)
    assert (found["state"], found["reason"]) == ("running", "exit code 6")
    assert found["logged"] == (tmp_path / "metrics.jsonl").stat().st_mtime
    empty = control.summary(here(run_dir=str(tmp_path / "nowhere")))
    assert (empty["step"], empty["checkpoint"], empty["attempts"], empty["reason"]) == (None, None, 0, None)


def test_a_target_that_cannot_be_asked_hides_no_other_job(state_home):
    put(here())
    put(here("strange"))
    record = json.loads((state_home / "strange.json").read_text())
    (state_home / "strange.json").write_text(json.dumps({**record, "target": "abacus"}))
    jobs = json.loads(launch("status", "--json").stdout)
    assert [found["name"] for found in jobs] == ["job", "strange"]
    assert jobs[1]["state"] == "unknown (job strange: this version has no target 'abacus')"


def test_no_jobs(state_home):
    assert launch("status").stdout == f"no jobs in {state_home}\n"


def test_a_job_goes_on_and_is_stopped(tmp_path, detached):
    said = detached(tmp_path, "-c", LISTEN, processes=2)
    assert "follow: python -m launch logs job --follow" in said
    assert json.loads(launch("status", "--json", "job").stdout)[0]["state"] == "running"
    refused = launch("local", "--run-dir", tmp_path, "--name", "job", "--", "true", check=False)
    assert (refused.returncode, len(list(tmp_path.glob("job*.json")))) == (2, 1)
    stopped = launch("stop", "job").stderr
    assert "asked to save and end" in stopped
    assert "ended (exit code 4 (preempted, everything is saved)); newest checkpoint: none" in stopped
    assert "there is nothing to stop" in launch("stop", "job").stderr
    assert "ends with exit code 4" in (tmp_path / "logs/launch-1.log").read_text()
    assert stat.S_IMODE((tmp_path / "job.json").stat().st_mode) == 0o600


def test_a_job_that_does_not_listen_is_killed(tmp_path, detached):
    detached(tmp_path, "-c", LISTEN, "deaf")
    begin = time.monotonic()
    assert "ended (exit code 137 (signal 9))" in launch("stop", "--kill", "job").stderr
    assert time.monotonic() - begin < registry.KILL_S  # by its loop, which has recorded it
    assert json.loads((tmp_path / "launch.jsonl").read_text().splitlines()[-1])["codes"] == [-9]


def test_a_killed_launcher_is_told(tmp_path, detached):
    detached(tmp_path, "-c", LISTEN)
    os.kill(int(registry.find("job").handle["pid"]), signal.SIGKILL)
    wait_for(lambda: registry.state(registry.find("job")).startswith("lost"))
    assert "there is nothing to stop" in launch("stop", "job").stderr


TWICE = """
import os, pathlib, sys, time
attempt = len(list(pathlib.Path(sys.argv[1], "logs").glob("[0-9]*")))
for number in range(30):
    print("attempt", attempt, "line", number, flush=True)
sys.stdout.write("no newline")
sys.stdout.flush()
time.sleep(1)
sys.exit(6 if attempt == 1 else 0)
"""


def test_logs_are_followed_over_attempts_to_the_end(tmp_path, detached):
    detached(tmp_path, "-c", TWICE, str(tmp_path))
    seen = launch("logs", "--follow", "--lines", 1000, tmp_path).stdout.splitlines()
    wanted = [f"attempt 1 line {n}" for n in range(30)], [f"attempt 2 line {n}" for n in range(30)]
    assert seen == [*wanted[0], "no newline", *wanted[1], "no newline"]
    assert launch("logs", "job").stdout.splitlines() == [*wanted[1], "no newline"]
    assert launch("logs", "job", "--lines", 2, "--attempt", 1).stdout.splitlines() == [
        "attempt 1 line 29",
        "no newline",
    ]
    assert launch("logs", "job", "--lines", 0).stdout == ""
    assert launch("logs", "job", "--follow").stdout.splitlines() == [*wanted[1][11:], "no newline"]


def test_logs_of_one_process(tmp_path, detached):
    detached(tmp_path, "-c", LISTEN, "x", processes=2)
    wait_for(lambda: (tmp_path / "logs/1/all.log").read_text().count("\n") == 2)
    assert sorted(launch("logs", "job").stdout.splitlines()) == ["[0] listening x", "[1] listening x"]
    assert launch("logs", "job", "--process", 1).stdout == "listening x\n"
    for words in (["--process", 2], ["--attempt", 7], ["--attempt", "../1"]):
        done = launch("logs", "job", *words, check=False)
        assert (done.returncode, "attempts that have it:" in done.stderr) == (2, True)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, None])
def test_last_lines(tmp_path, count, monkeypatch):
    monkeypatch.setattr(logs, "_BLOCK", 7)
    lines = [f"line {n} {'.' * n}\n" for n in range(9)] + ["the end"]
    (tmp_path / "log").write_text("".join(lines))
    with (tmp_path / "log").open("rb") as file:
        logs._seek(file, count)
        wanted = lines if count is None else lines[max(0, len(lines) - count) :]
        assert file.read().decode() == "".join(wanted)


def test_a_job_is_repeated_as_it_was_started(tmp_path):
    hostile = ["a b", "$(touch pwned)", "'\"", "-x\ny"]
    program = "import pathlib, sys; pathlib.Path('out').open('a').write(repr(sys.argv[1:]) + chr(10))"
    options = ["--run-dir", "r", "--name", "again", "--max-restarts", "0"]
    launch("local", *options, "--", sys.executable, "-c", program, *hostile, cwd=tmp_path)
    shown = launch("repeat", tmp_path / "r", "--dry-run").stdout
    assert shlex.split(shown)[-4:] == hostile
    launch("repeat", "again")
    assert (tmp_path / "out").read_text().splitlines() == [repr(hostile)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r"]
    assert [path.name for path in (tmp_path / "r").glob("job*")] == ["job.json"]
    assert "neither a job's name nor a run directory" in launch("repeat", tmp_path, check=False).stderr


def test_the_job_that_was_started_last_is_repeated(tmp_path):
    for index, seconds in enumerate((1, 2, 1)):
        path = job.keep(Job(("true",), str(tmp_path), "a", grace_s=seconds), "local", ["local", "--", str(seconds)])
        os.utime(path, (index + 1.0, index + 1.0)) if seconds == 2 else None
    assert job.read_arguments(job.newest_job(tmp_path)) == (".", ["local", "--", "1"])
    target, fields = job.read(tmp_path / "job-2.json")
    fields["command"] = tuple(fields["command"])
    assert (target, Job(**{**fields, "environment": ()})) == ("local", Job(("true",), str(tmp_path), "a", grace_s=2))


def test_help_names_targets_and_actions():
    shown = launch("--help").stdout
    for name in ("targets:", "  local ", "actions:", *(f"  {action} " for action in control.ACTIONS)):
        assert name in shown
    assert "status takes no command" in launch("status", "--", "x", check=False).stderr


def on_terminal(folder, program, **environment):
    """What two processes of a program print on a terminal."""
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "launch", "local", "--processes", "2", "--run-dir", str(folder), "--"]
    process = subprocess.Popen(
        [*words, sys.executable, "-c", program],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **environment},
    )
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 1 << 16):
            shown += data
    except OSError:  # Linux: the other end was closed
        pass
    finally:
        os.close(leader)
        assert process.wait(timeout=20) == 0
    return shown.decode().replace("\r\n", "\n")


def test_prefixes_have_colours_on_a_terminal(tmp_path):
    shown = on_terminal(tmp_path / "a", "print('hello [1] you')")
    for prefix in ("[0] ", "[1] "):
        assert f"\x1b[{stream._colour(prefix)}m{prefix}\x1b[0mhello [1] you\n" in shown
    assert stream._colour("[0] ") != stream._colour("[1] ")
    assert sorted(on_terminal(tmp_path / "b", "print('x')", NO_COLOR="1").splitlines()) == ["[0] x", "[1] x"]
    assert "\x1b" not in (tmp_path / "a/logs/1/all.log").read_text()


STRANGE = """
import os, sys
umlaut = "\u00fc\\n".encode()
data = {"binary": bytes(range(256)) * 8, "long": b"x" * 3_000_000, "open": b"whole\\nno newline", "umlaut": umlaut}
os.write(1, b"first\\n")
sys.stdout.buffer.write(data[sys.argv[1]])
"""


@pytest.mark.parametrize("kind", ["binary", "long", "open", "umlaut"])
def test_any_output_reaches_the_logs(tmp_path, kind):
    command = ["local", "--processes", 2, "--run-dir", tmp_path, "--", sys.executable, "-c", STRANGE, kind]
    words = [sys.executable, "-m", "launch", *map(str, command)]
    done = subprocess.run(
        words, capture_output=True, cwd=ROOT, timeout=40, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    own = (tmp_path / "logs/1/0.log").read_bytes()
    assert own.startswith(b"first\n")
    merged = (tmp_path / "logs/1/all.log").read_bytes()
    assert merged.endswith(b"\n")
    lines = merged.split(b"\n")[:-1]
    assert all(line.startswith((b"[0] ", b"[1] ")) for line in lines)
    assert max(map(len, lines)) < 70_000
    mine = [line[4:] for line in lines if line.startswith(b"[0] ")]
    assert b"".join(mine) == own.replace(b"\n", b"")  # nothing lost, nothing mixed
    assert {"binary": 2056, "long": 3_000_006, "open": 22, "umlaut": 9}[kind] - 2 <= len(own)
    assert done.stdout.isascii()
    if kind == "umlaut":
        assert b"[0] \\xfc\n" in done.stdout


@pytest.mark.parametrize("handle", [{"host": "x"}, {"host": "x", "pid": "$(x)", "started": ""}, {"pid": "1"}])
def test_a_record_without_a_process(handle):
    record = Record("job", "local", "/somewhere", handle, 0.0)
    assert registry.state(record) == "unknown (its record does not say which process it is)"
    with pytest.raises(LaunchError, match=r"nothing to stop|stop it there"):
        registry.stop_process(record, signal.SIGTERM)


def test_nobody_has_to_read_all(tmp_path):
    launch(
        "local",
        "--run-dir",
        tmp_path,
        "--",
        sys.executable,
        "-c",
        "print('x' * 999, end='\\n' * 4); print('y' * 9999999)",
    )
    for words in (["logs", tmp_path], ["status"]):
        command = [sys.executable, "-m", "launch", *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=20) == 0


def test_a_log_that_cannot_be_read(tmp_path):
    (tmp_path / "logs/1/all.log").mkdir(parents=True)
    put(here(run_dir=str(tmp_path)))
    done = launch("logs", "job", check=False)
    assert (done.returncode, done.stderr) == (2, f"launch: {tmp_path}/logs/1/all.log: Is a directory\n")


def test_records_are_plain_data():
    assert [field.name for field in dataclasses.fields(Record)] == ["name", "target", "run_dir", "handle", "submitted"]
