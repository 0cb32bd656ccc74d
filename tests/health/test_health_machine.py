"""The doctor finds faults: wrong versions, missing libraries, folders that cannot be written."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from mtx.health import machine


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: Any) -> None:
    """The compilation cache is a setting of the process: other tests shall not compile into this machine's."""
    monkeypatch.setenv("MTX_COMPILATION_CACHE", "")


@pytest.mark.parametrize(
    ("version", "allowed", "within"),
    [
        ("0.10.2", ">=0.10.2,<0.12", True),
        ("0.11.9.dev3+cuda", ">=0.10.2,<0.12", True),
        ("0.12", ">=0.10.2,<0.12", False),
        ("0.9.99", ">=0.10.2,<0.12", False),
        ("15.0.0", "<16,>=15", True),
        ("2.2", "", True),
    ],
)
def test_versions_within_ranges(version: str, allowed: str, within: bool) -> None:
    assert machine._is_within(version, allowed) is within


def test_this_machine(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in machine.examine_machine(tmp_path)}
    assert {
        "python",
        "jax",
        "orbax-checkpoint",
        "tensorboardX",
        "devices",
        "cores",
        "memory",
        "disk",
    } <= findings.keys()
    assert findings["jax"].value == importlib.metadata.version("jax")
    assert [finding for finding in findings.values() if (finding.fault is None) != (finding.cure is None)] == []
    assert findings["jax"].fault is None
    assert findings["devices"].fault is None


def test_faults_are_found(tmp_path: Path, monkeypatch: Any) -> None:
    real = importlib.metadata.version
    wrong = {"flax": "0.1.0", "jaxlib": "0.9.0"}

    def version(name: str) -> str:
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return wrong.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (tmp_path / "file").write_text("")
    faults = {finding.name: finding for finding in machine.examine_machine(tmp_path / "file") if finding.fault}
    assert faults.keys() >= {"flax", "optax", "jaxlib", "disk"}
    assert "flax" in (faults["flax"].cure or "")
    assert faults["optax"].fault == "not installed"


def test_command(capsys: Any) -> None:
    from mtx.cli import main

    code = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    assert {"name": "jax", "value": importlib.metadata.version("jax"), "fault": None, "cure": None} in answer[
        "findings"
    ]
