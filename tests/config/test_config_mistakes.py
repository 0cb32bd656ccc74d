"""Configs with mistakes: the whole text of every message is kept. UPDATE_GOLDEN=1 rewrites it."""

import dataclasses
import os
import pathlib
import random
import string

import pytest

from mtx.config import checks, reader, schema
from mtx.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "config_mistakes"
CASES = sorted(path.stem for path in GOLDEN.glob("*.gin") if path.stem not in ("base", "circle", "faster"))
BASE = (GOLDEN / "base.gin").read_text()


def mistakes(load, *args):
    with pytest.raises(UserError) as caught:
        load(*args)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_messages(case, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    message = mistakes(reader.load, f"{case}.gin") + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(message)
    assert message == golden.read_text()


def test_base_of_the_cases_is_right():
    assert reader.load(GOLDEN / "base.gin").run.train.steps == 10


def test_training_needs_data():
    run = reader.load(GOLDEN / "base.gin").run
    message = mistakes(checks.require_training_data, dataclasses.replace(run, data=schema.Data(train={})))
    assert "Data.train is empty" in message
    assert "mtx data build" in message
    checks.require_training_data(dataclasses.replace(run, data=schema.Data(train={"store": 1.0})))


def test_command_line():
    overrides = ["Model.d_modle = 3", "Train.log_every = 1", "Train.seed = x", "Train.log_every = 2"]
    assert mistakes(reader.load_text, BASE, "base.gin", overrides) == (
        "3 mistakes in the config base.gin\n"
        "<command line>: Model has no field 'd_modle'; did you mean d_model?\n    Model.d_modle = 3\n"
        "<command line>: 'x' is no value: a string needs quotes; values are numbers, 'quoted strings', True, False, "
        "None, lists, dicts\n    Train.seed = x\n"
        "<command line>: Train.log_every is set at <command line> too: keep one\n    Train.log_every = 2"
    )


def test_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mistakes(reader.load, None) == (
        "no config given: name a .gin file; the sources have examples in configs/runs/"
    )
    (tmp_path / "configs" / "runs").mkdir(parents=True)
    (tmp_path / "configs" / "runs" / "one.gin").touch()
    assert mistakes(reader.load, None) == "no config given: name a .gin file; there is configs/runs/one.gin"
    assert mistakes(reader.load, "configs/runs/two.gin") == (
        f"no config file 'configs/runs/two.gin' (looked in {tmp_path}/configs/runs); there is configs/runs/one.gin"
    )
    assert mistakes(reader.load, "configs/runs") == (
        "'configs/runs' is a folder and a config is a file; there is configs/runs/one.gin"
    )
    (tmp_path / "config.gin").touch()
    assert mistakes(reader.load, tmp_path).endswith(f"a config is a file; its config is {tmp_path}/config.gin")


def test_unreadable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.gin").write_bytes(b"Tokenizer.path = '\xe9'\n")
    assert "latin.gin: 'latin.gin' is not UTF-8 text" in mistakes(reader.load, "latin.gin")
    (tmp_path / "folder.gin").mkdir()
    (tmp_path / "top.gin").write_text("include 'folder.gin'\n")
    assert "top.gin:1: cannot read 'folder.gin': Is a directory" in mistakes(reader.load, "top.gin")


def test_deep_nesting_is_a_mistake():
    depth = 20_000
    assert mistakes(reader.load_text, BASE + f"Data.train = {'[' * depth}{']' * depth}\n", "deep.gin")


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in mistakes(reader.load_text, "Model.\x1b[31m = 3\nTokenizer.path = '\x1b[0m", "x.gin")


def test_any_text_loads_or_is_a_mistake():
    """Broken at random, a config is still read or refused, never an error of ours."""
    rng = random.Random(0)
    lines = [
        line for case in CASES for line in (GOLDEN / f"{case}.gin").read_text().splitlines() if "include" not in line
    ]
    refused = 0
    for _ in range(400):
        text = list("\n".join(rng.sample(lines, 6)))
        for _ in range(rng.randrange(6)):
            where = rng.randrange(len(text))
            text[where : where + rng.randrange(3)] = rng.choice(string.punctuation + string.printable + "é\x00")
        try:
            reader.load_text(BASE + "".join(text), "random.gin")
        except UserError:
            refused += 1
    assert refused > 300


def test_broken_numbers():
    """Python 3.12 finds these earlier than 3.11 and words them in another way."""
    assert mistakes(reader.load_text, BASE + "Mesh.fsdp = 0x\n", "x.gin").startswith(
        "1 mistake in the config x.gin\nx.gin:9: "
    )
