"""Login nodes have old Pythons and nothing installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, run

SOURCES = sorted((ROOT / "launch").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_reads_as_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    used = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    used |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert used <= {*sys.stdlib_module_names, "launch"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))
    if path.name != "__init__.py":  # annotations as strings: `X | None` is no expression in 3.9
        assert "annotations" in {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}


def find_old_python():
    """A Python 3.9, the oldest that is promised; None: there is none here."""
    for path in [shutil.which("python3.9"), *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python"))]:
        if path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # no empty shim
            return path
    return None


@pytest.fixture(scope="module")
def old_python():
    found = find_old_python()
    if found is None:
        pytest.skip("no Python 3.9: neither python3.9 on PATH nor in ~/.pyenv")
    return found


def old(python, *words, cwd, check=True):
    """Runs the launcher as on a login node: nothing installed, warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-s", "-W", "error", "-m", "launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    assert not check or done.returncode == 0, done.stderr
    return done


def test_every_module_is_imported_by_python_3_9(old_python, tmp_path):
    names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in SOURCES]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    program = "import sys; assert sys.version_info[:2] == (3, 9); [__import__(name) for name in sys.argv[1:]]"
    words = [old_python, "-s", "-W", "error", "-c", program, *modules]
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_targets_and_actions(old_python, tmp_path):
    shown = old(old_python, "--help", cwd=tmp_path).stdout
    for path in (ROOT / "launch/targets").glob("[a-z]*.py"):
        assert f"  {path.stem} " in shown
        assert "--dry-run" in old(old_python, path.stem, "--help", cwd=tmp_path).stdout
    for action in ("status", "logs", "stop", "repeat"):
        assert f"  {action} " in shown
        shown_by_it = old(old_python, action, "--help", cwd=tmp_path).stdout
        assert shown_by_it.startswith(f"usage: python -m launch {action} [-h]")


DRY = {
    "local": ["--processes", "2"],
    "ssh": ["--hosts", "a[1-2]"],
    "slurm": ["--nodes", "2", "--gpus-per-node", "8"],
    "kubernetes": [
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--image",
        "registry.example/mtx:1",
        "--volume",
        "disk:/data",
    ],
}


@pytest.mark.parametrize("target", DRY)
def test_dry_run(old_python, tmp_path, target):
    words = [*DRY[target], "--dry-run", "--", "mtx", "train", "a.gin", "--run-dir", "/data/r"]
    assert "/data/r" in old(old_python, target, *words, cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_job(old_python, tmp_path):
    program = (
        "import json, os, pathlib, sys; here = pathlib.Path('n' + os.environ['MTX_PROCESS_ID']);"
        "code = 0 if here.exists() else 6; here.touch(); print('hello'); sys.exit(code)"
    )
    words = ["--processes", 2, "--backoff-s", 0, "--run-dir", "r", "--name", "old", "--", old_python, "-c", program]
    done = old(old_python, "local", *words, cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["[0] hello"] * 2 + ["[1] hello"] * 2
    (found,) = json.loads(old(old_python, "status", "old", "--json", cwd=tmp_path).stdout)
    assert (found["state"], found["attempts"]) == ("ended (exit code 0 (done))", 2)
    assert old(old_python, "logs", "old", "--process", 1, cwd=tmp_path).stdout == "hello\n"
    old(old_python, "repeat", "r", cwd=tmp_path)
    assert len((tmp_path / "r/logs/3/all.log").read_text().splitlines()) == 2
    assert old(old_python, "local", "--", "x", cwd=tmp_path, check=False).returncode == 2


@pytest.mark.parametrize(("words", "message"), [
    (["local", "--node", "2", "--", "mtx"], "python -m launch local: error: unknown: --node 2; see `python -m launch"),
    (["local", "mtx", "a b"], "unknown: mtx 'a b'; the command goes after `--`; see `python -m launch local --help`"),
    (["stop", "a", "b"], "launch stop: error: unknown: b; see `python -m launch stop --help`"),
    (["ssh", "--hosts", "a"], "no command: `python -m launch ssh [options] -- mtx "),
])  # fmt: skip
def test_mistakes_name_the_target(tmp_path, words, message):
    done = old(sys.executable, *words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_help_of_this_python():
    assert "local" in run(["-m", "launch", "--help"]).stdout
