"""What first users do wrong: an exit code, and a message that says what, where, what is allowed and how to mend it."""

from __future__ import annotations

import re
import shutil

import pytest
from programs import run

from mtx.cli import main


def damage(path):
    """Flips a bit in the middle of the largest file of a folder."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def mistake(workplace, capsys, tmp_path):
    """mistake(*settings) -> the message, in one line; asserts the exit code. Our own bugs would raise here."""

    def train(*settings, run_dir=None, options=(), code=2):
        run_dir = run_dir or tmp_path / "run"
        sets = [part for setting in settings for part in ("--set", setting)]
        assert main(["train", str(workplace.config), "--run-dir", str(run_dir), "--quiet", *options, *sets]) == code
        return re.sub(r"\s+", " ", capsys.readouterr().err)

    return train


def test_no_config(capsys):
    assert main(["train"]) == 2
    assert "no config given: name a .gin file" in capsys.readouterr().err
    assert main(["train", "runs/none.gin"]) == 2
    assert "runs/none.gin" in capsys.readouterr().err


def test_unknown_key(mistake):
    message = mistake("Model.num_layer = 2")
    assert "Model.num_layer" in message
    assert "num_layers" in message.replace("Model.num_layer ", "")


def test_missing_store(mistake, tmp_path):
    message = mistake(f"Data.train = {{'{tmp_path}/none': 1.0}}")
    assert f"{tmp_path}/none: no such token store; make it with `mtx data build" in message
    assert not (tmp_path / "run").exists()


def test_wrong_tokenizer(mistake, workplace, tmp_path):
    other = tmp_path / "other.model"
    train = ["tokenizer", "train", str(workplace.folder / "validation.jsonl"), "--vocab-size", "380", "--quiet"]
    assert main([*train, "--out", str(other)]) == 0
    message = mistake(f"Tokenizer.path = '{other}'")
    assert "was built with another tokenizer" in message
    assert str(other) in message
    assert "set Tokenizer.path to" in message


def test_vocabulary_larger_than_the_models(mistake):
    message = mistake("Model.vocab_size = 300")
    assert "Model.vocab_size = 300 is less than" in message
    assert "set Model.vocab_size to 384 or more" in message


def test_batch_that_does_not_divide(mistake):
    message = mistake("Train.global_batch_size = 12")
    assert "Train.global_batch_size = 12 (<command line>) sequences do not divide over Mesh.data = 8" in message
    assert "8 or 16" in message
    assert "the nearest layout of 8 devices that works with the other settings as they are: Mesh.data = 4, " in message


def test_more_mesh_than_devices(mistake):
    message = mistake("Mesh.tensor = 16")
    assert "tensor 16 needs 16 devices and there are 8" in message
    assert "--cpu-devices 16" in message


def test_run_directory_of_another_config(mistake, workplace, straight):
    before = (workplace.folder / straight / "config.gin").read_text()
    message = mistake("Train.seed = 5", "Model.d_model = 64", run_dir=workplace.folder / straight)
    assert "cannot go on with this config" in message
    assert "Train.seed: 0 -> 5 (changes the data, set at <command line>)" in message
    assert "Model.d_model: 32 -> 64 (impossible, set at <command line>)" in message
    assert "Start a new run with another --run-dir" in message
    settings = ["Train.seed = 5", "AdamW.weight_decay = 0.2", "Mesh.data = 8"]
    message = mistake(*settings, run_dir=workplace.folder / straight, options=["--accept", "Train.dropout"])
    assert "add --accept Train.seed --accept AdamW.weight_decay If not," in message
    assert (workplace.folder / straight / "config.gin").read_text() == before


def test_length_that_bends_the_schedule(mistake, workplace, straight):
    settings = ["Train.steps = 30", "WarmupCosine.decay_steps = None"]
    message = mistake(*settings, run_dir=workplace.folder / straight)
    assert "WarmupCosine.decay_steps: 20 -> None (changes the math" in message
    assert "add --accept Train.steps --accept WarmupCosine.decay_steps If not," in message


def test_not_a_run_directory(mistake, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    message = mistake(run_dir=tmp_path)
    assert "is no run directory" in message
    assert "give another --run-dir" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_corrupt_store(mistake, workplace, tmp_path):
    shutil.copytree(workplace.folder / "train", tmp_path / "store")
    damage(tmp_path / "store" / "tokens")
    message = mistake(f"Data.train = {{'{tmp_path}/store': 1.0}}")
    assert f"{tmp_path}/store" in message
    assert "damaged" in message
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_resume_of_what_is_not_there(mistake, workplace, straight, tmp_path):
    run_dir = workplace.folder / straight
    assert "has no checkpoint of step 7; there is 4, 8, 12, 16, 20" in mistake(
        run_dir=run_dir, options=["--resume", "7"]
    )
    assert "is the directory of a run" in mistake(run_dir=run_dir, options=["--resume", "never"])
    assert "does not exist" in mistake(run_dir=tmp_path / "none", options=["--resume", "7"])
    assert "--resume sometimes" in mistake(run_dir=run_dir, options=["--resume", "sometimes"])


def test_every_checkpoint_is_damaged(mistake, workplace, straight, tmp_path):
    shutil.copytree(workplace.folder / straight, tmp_path / "run")
    for step in (tmp_path / "run/checkpoints").iterdir():
        damage(step)
    message = mistake(run_dir=tmp_path / "run", code=5)
    assert str(tmp_path / "run/checkpoints") in message
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 5  # nothing is deleted


def test_divergence(workplace):
    process = workplace.train("diverged", "AdamW.learning_rate = 1e30", check=False)
    assert process.returncode == 3, process.stderr
    assert "Traceback" not in process.stderr
    assert "Lower AdamW.learning_rate" in process.stderr


def test_mistake_in_a_process_of_its_own(workplace):
    """Nothing but the message, also where libraries have started already."""
    process = run(workplace.command("none", "Mesh.tensor = 4"), env=workplace.environment(), check=False)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("mtx: the mesh tensor 4 needs 4 devices and there are 1")
    assert len(process.stderr.splitlines()) == 1
