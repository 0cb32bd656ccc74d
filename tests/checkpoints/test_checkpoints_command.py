"""`mtx checkpoint` looks, says what it sees, and changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtx.checkpoints import manifest, steps
from mtx.cli import main

NOTED: dict[str, Any] = {
    "config_digest": "cafe",
    "config": "Model.d_model = 32\n",
    "validation": {"books": 2.25, "web": 3.12345},
    "probe": {"loss": 2.5, "grad_norm": 1.0, "batch": "00ff"},
    "digests": {"params/w": "0123abcd"},
    "spikes": [8] * 667,
    "ledger": {
        "samples": 1234,
        "tokens": 77,
        "skipped_samples": 0,
        "sources": [
            {
                "store": "/data/a",
                "digest": "ab",
                "samples": 1234,
                "tokens": 77,
                "skipped_samples": 0,
                "epochs": 1 / 3,
            }
        ],
    },
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with steps 10 and 20, and what a killed save left."""
    directory = tmp_path / "checkpoints"
    for step in (10, 20):
        partial = steps.saving_dir(directory, step)
        partial.mkdir(parents=True)
        (partial / "data").write_bytes(b"x" * 1500)
        arrays = {"params/w": manifest.ArrayEntry(shape=(5, 3), dtype="float32")}
        meta = {"tokens": step * 64, "mesh": {"data": 2, "fsdp": 1}} | (NOTED if step == 10 else {})
        files = manifest.digest_files(partial, ["data"])
        manifest.write(partial, step=step, meta=meta, arrays=arrays, files=files)
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
    assert (answer["step"], answer["meta"]) == (20, {"tokens": 1280, "mesh": {"data": 2, "fsdp": 1}})
    assert answer["arrays"] == {"params/w": {"shape": [5, 3], "dtype": "float32"}}
    assert answer["files"]["data"]["size_bytes"] == 1500
    assert ask(capsys, "show", str(run_dir), "--step", "10")[1]["meta"]["config"] == NOTED["config"]
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 10  1.5 kB  saved 20")
    assert lines[0].endswith("  640 tokens  mesh data 2  validation books 2.2500, web 3.1235  with probe")
    assert lines[1].endswith("  1.28k tokens  mesh data 2  no probe")
    assert lines[2] == "not a checkpoint: 30.saving"


def test_show_for_people(run_dir: Path, capsys: Any) -> None:
    assert main(["checkpoint", "show", str(run_dir), "--step", "10"]) == 0
    text = capsys.readouterr().out
    for line in (
        "validation books 2.2500, web 3.1235",
        "config_digest: cafe",
        'probe: {"batch": "00ff", "grad_norm": 1.0, "loss": 2.5}',
        "spikes: 2001 characters, see --json",
        "  source   samples  tokens  skipped_samples  epochs",
        "  /data/a    1,234      77                0   0.333",
        "  float32[5, 3]  params/w  0123abcd",
    ):
        assert line in text.splitlines()
    assert "Model.d_model" not in text
    assert main(["checkpoint", "show", str(run_dir), "--step", "10", "--config"]) == 0
    assert capsys.readouterr().out == NOTED["config"]


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
    "arguments",
    [
        ["list", "nowhere"],
        ["show", "RUN", "--step", "11"],
        ["verify", "RUN/checkpoints"],
        ["show", "RUN", "--step", "20", "--config"],
        ["list", "RUN", "--config"],
    ],
)
def test_mistakes(run_dir: Path, capsys: Any, arguments: list[str]) -> None:
    assert main(["checkpoint", *(argument.replace("RUN", str(run_dir)) for argument in arguments)]) == 2
    assert "checkpoint" in capsys.readouterr().err
