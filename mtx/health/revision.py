"""The git revision of a checkout, read from its files: on a compute node there may be no git to ask."""

from __future__ import annotations

from pathlib import Path


def find_git_revision(path: Path) -> str | None:
    """The commit that the checkout around `path` stands on; None outside of one and where nothing is committed yet."""
    for folder in [path, *path.parents]:
        entry = folder / ".git"
        if entry.is_file():  # a linked work tree or a submodule: "gitdir: PATH"
            return _read_head(folder / entry.read_text().removeprefix("gitdir:").strip())
        if entry.is_dir():
            return _read_head(entry)
    return None


def _read_head(git_dir: Path) -> str | None:
    head = (git_dir / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head
    name = head.removeprefix("ref:").strip()
    common = git_dir / "commondir"
    folders = [git_dir, git_dir / common.read_text().strip()] if common.exists() else [git_dir]
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
    for folder in folders:
        packed = folder / "packed-refs"
        for line in packed.read_text().splitlines() if packed.is_file() else []:
            revision, _, ref = line.partition(" ")
            if ref == name:
                return revision
    return None
