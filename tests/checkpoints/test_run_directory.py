"""A run directory: there whole or not at all, used by one run at a time, and going on only with what was agreed to."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from programs import environment, run

from mtx.checkpoints import lock
from mtx.checkpoints.run_directory import RunDirectory
from mtx.config.reader import load_text
from mtx.errors import UserError

CONFIG = """\
Model.vocab_size = 96
Model.d_model = 32
Model.num_layers = 2
Model.num_heads = 4
Model.max_seq_len = 16
Train.seq_len = 16
Train.global_batch_size = 8
Train.steps = 100
"""


def load(*statements):
    return load_text(CONFIG, "run.gin", statements)


@pytest.fixture
def tokenizer_files(tmp_path) -> dict[str, Path]:
    source = tmp_path / "source.model"
    source.write_bytes(b"pieces")
    return {"tokenizer.model": source}


@pytest.fixture
def directory(tmp_path, tokenizer_files) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs/x", load().text(), tokenizer_files)


def names(path: Path) -> list[str]:
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))


def refuse(code: int):
    """A function of `os` on a file system that answers so."""

    def fail(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), path)

    return fail


def test_create_is_whole(directory):
    assert names(directory.path) == ["config.gin", "tokenizer", "tokenizer/tokenizer.model"]
    assert names(directory.path.parent) == ["x", *(f"x/{name}" for name in names(directory.path))]
    assert directory.config().run == load().run
    with pytest.raises(UserError, match="is the directory of a run already"):
        RunDirectory.create(directory.path, load().text(), {})


def test_create_fills_an_empty_directory(tmp_path, tokenizer_files):
    (tmp_path / "volume").mkdir()
    inode = (tmp_path / "volume").stat().st_ino
    RunDirectory.create(tmp_path / "volume", load().text(), tokenizer_files)
    assert (tmp_path / "volume").stat().st_ino == inode
    assert (tmp_path / "volume/config.gin").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_create_that_fails_leaves_nothing(tmp_path, tokenizer_files, exists, monkeypatch):
    path = tmp_path / "runs/x"
    path.parent.mkdir()
    if exists:
        path.mkdir()
    files = {**tokenizer_files, "vanished.json": tmp_path / "vanished.json"}
    message = f"{path} cannot be written: No such file or directory ({tmp_path / 'vanished.json'}); mend that, or give"
    with pytest.raises(UserError, match=re.escape(message)):
        RunDirectory.create(path, load().text(), files)
    assert names(path.parent) == (["x"] if exists else [])
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left on device"):
        RunDirectory.create(path, load().text(), tokenizer_files)
    assert names(path.parent) == (["x"] if exists else [])
    monkeypatch.undo()
    RunDirectory.create(path, load().text(), tokenizer_files)


@pytest.mark.parametrize("left", [[".create/tokenizer/tokenizer.model"], [".create/config.gin", "tokenizer/t"], []])
def test_create_where_a_launcher_was_and_an_attempt_was_killed(tmp_path, tokenizer_files, left):
    for name in ("logs/a", *left):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("partial")
    assert not RunDirectory.exists(tmp_path / "x")
    RunDirectory.create(tmp_path / "x", load().text(), tokenizer_files)
    assert names(tmp_path / "x") == ["config.gin", "logs", "logs/a", "tokenizer", "tokenizer/tokenizer.model"]


def test_a_folder_of_ones_own_is_no_leftover(tmp_path, tokenizer_files):
    (tmp_path / "x/tokenizer").mkdir(parents=True)
    with pytest.raises(UserError, match="is no run directory"):
        RunDirectory.create(tmp_path / "x", load().text(), tokenizer_files)
    assert names(tmp_path / "x") == ["tokenizer"]


def test_create_next_to_another_that_was_quicker(tmp_path, tokenizer_files, monkeypatch):
    path, rename = tmp_path / "x", Path.rename

    def late(self, target):
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(UserError, match="Directory not empty"):
        RunDirectory.create(path, load().text(), tokenizer_files)
    assert names(tmp_path) == ["source.model", "x", *(f"x/{name}" for name in names(path))]


HOLDER = """
import sys, time
from mtx.checkpoints.run_directory import RunDirectory
with RunDirectory.open(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_of_a_killed_process(directory):
    command = [sys.executable, "-c", HOLDER, str(directory.path)]
    holder = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        user = f"is in use by process {holder.pid} on host {socket.gethostname()} since 20"
        with pytest.raises(UserError, match=f"{re.escape(str(directory.path))} {user}.*: stop it, or give another"):
            directory.lock().__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        with directory.lock():
            assert json.loads((directory.path / "lock").read_text())["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.stdout.close()
        holder.wait()


def test_lock_is_exclusive_and_stays(directory):
    with directory.lock():
        content = (directory.path / "lock").read_bytes()
        with pytest.raises(UserError, match=f"process {os.getpid()} on host"), directory.lock():
            pass
        assert (directory.path / "lock").read_bytes() == content
        (directory.path / "lock").write_bytes(content[:10])
        with pytest.raises(UserError, match="is in use by another process: stop it"), directory.lock():
            pass
    with directory.lock():
        pass
    assert names(directory.path) == ["config.gin", "lock", "tokenizer", "tokenizer/tokenizer.model"]


def test_lock_where_there_are_none(directory, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    told: list[str] = []
    with directory.lock(report=told.append):
        (line,) = told
    assert "its file system has no locks" in line


def test_lock_raises_other_failures(directory, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be written: Input/output error"), directory.lock():
        pass


def test_what_the_body_raises_is_not_explained(directory):
    with pytest.raises(OSError, match="its own"), directory.lock():
        raise OSError("its own")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_write_protected(directory, tmp_path, tokenizer_files, code, monkeypatch):
    """By what the system answers; `test_read_only_file_system` has a real one."""
    reason = f"cannot be written: {os.strerror(code)}"
    monkeypatch.setattr(lock.os, "open", refuse(code))
    with pytest.raises(UserError, match=f"{directory.path} {reason}"), directory.lock():
        pass
    monkeypatch.undo()
    monkeypatch.setattr(os, "mkdir", refuse(code))
    with pytest.raises(UserError, match=f"{tmp_path / 'new'} {reason}"):
        RunDirectory.create(tmp_path / "new", load().text(), tokenizer_files)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", refuse(code))
    with pytest.raises(UserError, match=f"{directory.path} {reason}"):
        directory.record(load("Mesh.tensor = 2"), 7)


PROTECTED = """
import sys
from pathlib import Path
from mtx.checkpoints.run_directory import RunDirectory
from mtx.config.reader import load
from mtx.errors import UserError
path = Path(sys.argv[1])
directory = RunDirectory.open(path / "x")

def lock():
    with directory.lock():
        print("locked")

def record():
    directory.record(load(path / "x/config.gin", ["Mesh.tensor = 2"]), 7)

def create():
    RunDirectory.create(path / "y/z", "", {})

for write in (lock, record, create):
    try:
        write()
    except UserError as error:
        print(error)
"""


def in_own_mounts(script: str, *arguments: str) -> list[str]:
    """A shell script in a mount namespace of its own, which ends with it."""
    return ["unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *arguments]


def test_read_only_file_system(directory, tmp_path):
    if shutil.which("unshare") is None or subprocess.run(in_own_mounts("mount -t tmpfs none /mnt")).returncode:
        pytest.skip("nothing can be mounted here")
    with directory.lock():  # its file may be there from before
        pass
    mount = tmp_path / "mount"
    mount.mkdir()
    script = 'mount -t tmpfs none "$1"; cp -r "$2" "$1/x"; mount -o remount,ro "$1"; shift 2; exec "$@"'
    program = [sys.executable, "-c", PROTECTED, str(mount)]
    command = in_own_mounts(script, str(mount), str(directory.path), *program)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split(" cannot be written: Read-only file system")[0] for line in lines] == [
        f"{mount}/x", f"{mount}/x", f"{mount}/y/z"
    ]  # fmt: skip


def check(directory, config, tokenizer_files, **options):
    return directory.check_resume(config, **{"step": 40, "meta": {}, "tokenizer_files": tokenizer_files, **options})


def test_resume_is_compared_with_the_checkpoint(directory, tokenizer_files):
    seeded = load("Train.seed = 5")
    assert check(directory, load(), tokenizer_files) == check(directory, load(), tokenizer_files, step=None)
    with pytest.raises(UserError) as error:
        check(directory, seeded, tokenizer_files)
    assert str(error.value).splitlines() == [
        f"{directory.path} would go on as another run: the config differs from that of its checkpoint 40 in",
        "  Train.seed: 0 -> 5 (changes the data, set at <command line>)",
        "If that is meant, add --accept Train.seed",
        f"If not, go on with {directory.path}/config.gin, or give another --run-dir",
    ]
    # The checkpoint has that seed: it is the directory's config that is out of date.
    assert check(directory, seeded, tokenizer_files, meta={"config": seeded.text()}).accepted == ()
    taken = check(directory, seeded, tokenizer_files, accepted=frozenset({"Train.seed"}))
    assert taken.accepted == ("Train.seed: 0 -> 5 (changes the data, set at <command line>)",)
    with pytest.raises(UserError, match="that it was started with in"):
        check(directory, seeded, tokenizer_files, step=None)
    assert names(directory.path) == ["config.gin", "tokenizer", "tokenizer/tokenizer.model"]
    directory.record(seeded, 40)
    assert check(directory, seeded, tokenizer_files, meta={"config": load().text()}).accepted == taken.accepted


def test_impossible_resume_names_everything(directory, tokenizer_files):
    accepted = frozenset({"Model.d_model", "Train.seed"})
    with pytest.raises(UserError) as error:
        check(directory, load("Model.d_model = 64", "Train.dropout = 0.1"), tokenizer_files, accepted=accepted)
    assert str(error.value).splitlines() == [
        f"{directory.path} cannot go on with this config, which differs from that of its checkpoint 40 in",
        "  Model.d_model: 32 -> 64 (impossible, set at <command line>)",
        "  Train.dropout: 0.0 -> 0.1 (changes the math, set at <command line>)",
        f"Start a new run with another --run-dir, or go on with {directory.path}/config.gin",
    ]


def test_tokenizer_counts_by_its_content(directory, tokenizer_files, tmp_path):
    moved = shutil.copy(tokenizer_files["tokenizer.model"], tmp_path / "moved.model")
    check(directory, load("Tokenizer.path = 'moved.model'"), {"tokenizer.model": Path(moved)})
    other = tmp_path / "other.model"
    other.write_bytes(b"others")
    for files in ({"tokenizer.model": other}, {"tokenizer.json": Path(moved)}):
        with pytest.raises(UserError, match="is not the tokenizer that the run began with"):
            check(directory, load(), files)
    shutil.rmtree(directory.path / "tokenizer")  # as of weights that were imported without one
    check(directory, load(), {"tokenizer.model": other})


def test_record_keeps_every_config(directory):
    first = (directory.path / "config.gin").read_text()
    directory.record(load(), 5)
    assert not list(directory.path.glob("config.until*"))
    directory.record(load("Mesh.tensor = 2"), 5)
    second = (directory.path / "config.gin").read_text()
    directory.record(load("Mesh.tensor = 4"), 5)
    assert (directory.path / "config.until-5.gin").read_text() == first
    assert (directory.path / "config.until-5-2.gin").read_text() == second
    assert directory.config().run.mesh.tensor == 4


def test_mistaken_key_costs_nothing(tmp_path):
    """It is found before JAX starts, and without a run directory."""
    (tmp_path / "run.gin").write_text(CONFIG)
    command = ["-X", "importtime", "-m", "mtx", "train", str(tmp_path / "run.gin"), "--run-dir", str(tmp_path / "x")]
    process = run([*command, "--accept", "Train.sed"], check=False)
    assert process.returncode == 2
    assert "--accept Train.sed: no such field; did you mean Train.seed" in process.stderr
    assert not re.search(r"\| +jax$", process.stderr, re.MULTILINE)
    assert not (tmp_path / "x").exists()
