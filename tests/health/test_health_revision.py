"""The revision that is read from a checkout's files is the one that git tells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mtx.health.revision import find_git_revision

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_revision_of_every_kind_of_checkout(tmp_path: Path) -> None:
    repository, linked = tmp_path / "repository", tmp_path / "linked"
    (repository / "deep" / "down").mkdir(parents=True)
    assert find_git_revision(repository) is None
    git(repository, "init")
    assert find_git_revision(repository) is None
    git(repository, "commit", "--allow-empty", "-m", "one")
    first = git(repository, "rev-parse", "HEAD")
    assert find_git_revision(repository / "deep" / "down") == first
    git(repository, "worktree", "add", "-b", "side/branch", str(linked))
    git(linked, "commit", "--allow-empty", "-m", "two")
    second = git(linked, "rev-parse", "HEAD")
    assert second != first
    assert find_git_revision(linked) == second
    git(repository, "pack-refs", "--all")
    assert find_git_revision(repository) == first
    assert find_git_revision(linked) == second
    git(repository, "checkout", "--detach", second)
    assert find_git_revision(repository) == second
