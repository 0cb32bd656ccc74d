"""`mtx checkpoint` looks, says what it sees, and changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtx.checkpoints import manifest, steps
from mtx.cli import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with steps 10 and 20, and what a killed save left."""
    directory = tmp_path / "checkpoints"
    for step in (10, 20):
        partial = steps.saving_dir(directory, step)
        partial.mkdir(parents=True)
        (partial / "data").write_bytes(b"x" * 1500)
        arrays = {"params/w": manifest.ArrayEntry(shape=(5, 3), dtype="float32")}
        manifest.write(partial, step=step, meta={"tokens": step * 64, "mesh": {"data": 2}}, arrays=arrays)
        steps.publish(directory, step)
    (directory / "30.saving").mkdir()
    return tmp_path


def ask(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["checkpoint", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list_and_show(run_dir: Path, capsys: Any) -> None:
    code, answer = ask(capsys, "list", str(run_dir))
    assert code == 0
    assert [(entry["step"], entry["size_bytes"]) for entry in answer["checkpoints"]] == [(10, 1500), (20, 1500)]
    assert answer["not_checkpoints"] == ["30.saving"]
    code, answer = ask(capsys, "show", str(run_dir))
    assert code == 0
    assert (answer["step"], answer["meta"]) == (20, {"tokens": 1280, "mesh": {"data": 2}})
    assert answer["arrays"] == {"params/w": {"shape": [5, 3], "dtype": "float32"}}
    assert answer["files"]["data"]["size_bytes"] == 1500
    assert main(["checkpoint", "show", str(run_dir), "--step", "10"]) == 0
    text = capsys.readouterr().out
    assert "tokens: 640" in text
    assert "float32[5, 3]  params/w" in text
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "step 10  1.5 kB  1 files" in capsys.readouterr().out


def test_verify_tells_one_bad_from_all_bad(run_dir: Path, capsys: Any) -> None:
    before = sorted(run_dir.rglob("*"))
    assert ask(capsys, "verify", str(run_dir))[0] == 0
    (run_dir / "checkpoints" / "20" / "data").write_bytes(b"y" * 1500)
    code, answer = ask(capsys, "verify", str(run_dir))
    assert code == 2
    assert [entry["ok"] for entry in answer["checkpoints"]] == [True, False]
    assert ask(capsys, "verify", str(run_dir), "--step", "10")[0] == 0
    assert ask(capsys, "verify", str(run_dir), "--step", "20")[0] == 2
    (run_dir / "checkpoints" / "10" / "manifest.json").write_text("")
    assert ask(capsys, "verify", str(run_dir))[0] == 5
    assert main(["checkpoint", "verify", str(run_dir), "--quiet"]) == 5
    assert "content changed" in capsys.readouterr().out
    code, answer = ask(capsys, "list", str(run_dir))
    assert "damaged" in answer["checkpoints"][0]["problem"]
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["list", "nowhere"], ["show", "RUN", "--step", "11"], ["verify", "RUN/checkpoints"]]
)
def test_mistakes(run_dir: Path, capsys: Any, arguments: list[str]) -> None:
    assert main(["checkpoint", *(argument.replace("RUN", str(run_dir)) for argument in arguments)]) == 2
    assert "checkpoints" in capsys.readouterr().err
