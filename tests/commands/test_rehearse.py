"""`mtx rehearse`: what it asks for, what it answers, and its exit codes. The compiler is a stand-in."""

import json
import os
import signal
import time

import pytest
from planning.rehearsals import make_step

from mtx import cli
from mtx.planning import rehearsal
from mtx.planning.budget import KIND

KEYS = {
    "argument_bytes", "temp_bytes", "peak_bytes", "fits", "compile_seconds", "matmul_flops", "model_flops",
    "collectives", "replicated_parameters", "findings",
}  # fmt: skip
CONFIG = """\
Model.vocab_size = 96
Model.d_model = 32
Model.num_layers = 2
Model.num_heads = 4
Model.max_seq_len = 16
Mesh.data = -1
Train.steps = 4
Train.seq_len = 16
Train.global_batch_size = 16
"""
COMPILED = {"outside": "all-gather", "shape": "f32[1024,1024]", "groups": "{}"}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def compiler(monkeypatch):
    """What it gives can be changed; what it was asked for is noted."""
    asked, given = [], {"outside": "all-gather", "shape": "f32[1024,1024]", "groups": "{}"}

    def compile_apart(case, **arguments):
        asked.append((case, arguments))
        return make_step(case, **given).compiled

    monkeypatch.setattr(rehearsal, "compile_apart", compile_apart)
    return asked, given


def test_json_has_the_keys_of_the_contract(config, compiler, capsys):
    assert cli.main(["rehearse", config, "--gpu", "H100", "--hosts", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) >= KEYS
    gather = {"kind": "all-gather", "axes": ["data"], "count": 1, "bytes": 2**22, "crosses_nvlink_domain": True}
    assert answer["collectives"] == [gather]
    assert answer["fits"] is True
    assert [finding["severity"] for finding in answer["findings"]] == ["note"]
    (case, arguments), *_ = compiler[0]
    assert (case.cluster.num_gpus, case.run.mesh.data, arguments["gpus_per_host"]) == (16, 16, 8)


def test_the_cluster_of_the_config_is_the_default(config, compiler, capsys):
    sets = ["--set", "Cluster.gpu = 'GB200'", "--set", "Cluster.gpus = 8", "--set", "Cluster.gpus_per_host = 4"]
    assert cli.main(["rehearse", config, *sets]) == 0
    (case, arguments), *_ = compiler[0]
    assert (case.cluster.gpu.name, case.cluster.num_gpus, arguments["gpus_per_host"]) == ("GB200", 8, 4)
    out = capsys.readouterr().out
    for words in ("8 GB200: data 8", "memory of a GPU", "all-gather", "NVLink", "mtx/nn/linear.py:40", "1 findings"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which GPU? Give --gpu NAME, or Cluster.gpu"),
        (["--gpu", "H1000"], "no GPU 'H1000' in the table; there are A100-40"),
        (["--gpu", "H100"], "how many GPUs? Give --hosts N"),
        (["--gpu", "H100", "--hosts", "1", "--budget", "none.json"], "none.json: No such file"),
        (["--gpu", "H100", "--set", "Cluster.gpus = 12"], "12 GPUs are no whole number of machines with 8"),
        (["--gpu", "H100", "--hosts", "4"], "Train.global_batch_size"),
        (["--gpu", "H100", "--hosts", "2", "--set", "Mesh.data = 4"], "takes 4 GPUs, and 16 are given: give 4 GPUs"),
        (["--gpu", "H100", "--hosts", "2", "--write-budget", "no/folder.json"], "there is no folder no; make it first"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(config, compiler, capsys, arguments, message):
    assert cli.main(["rehearse", config, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert compiler[0] == []


def test_a_budget_is_kept_or_broken(config, compiler, capsys, tmp_path):
    budget = str(tmp_path / "budget.json")
    command = ["rehearse", config, "--gpu", "H100", "--hosts", "2", "--quiet"]
    assert cli.main([*command, "--write-budget", budget]) == 0
    assert cli.main([*command, "--budget", budget]) == 0
    assert "within the budget" in capsys.readouterr().out
    compiler[1]["shape"] = "f32[1024,1040]"  # 1.6 % more: within the tolerance
    assert cli.main([*command, "--budget", budget]) == 0
    assert "+1.56%" in capsys.readouterr().out
    compiler[1]["shape"] = "f32[1024,1056]"
    assert cli.main([*command, "--budget", budget]) == 1
    out = capsys.readouterr().out
    assert "GREW" in out
    assert "1 of 6 figures grew past the budget" in out
    assert cli.main([*command, "--budget", budget, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["grown"] == ["all-gather over data, bytes"]
    compiler[1]["outside"] = "all-reduce"  # a kind of exchange that was not there
    assert cli.main([*command, "--budget", budget]) == 1


def test_a_budget_keeps_its_tolerances_and_says_what_changed(config, compiler, capsys, tmp_path):
    budget = tmp_path / "budget.json"
    command = ["rehearse", config, "--gpu", "H100", "--hosts", "2", "--quiet", "--write-budget", str(budget)]
    assert cli.main(command) == 0
    document = json.loads(budget.read_text())
    document["figures"]["all-gather over data, bytes"]["tolerance"] = 0.5
    budget.write_text(json.dumps(document))
    compiler[1]["shape"] = "f32[1024,2048]"
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "all-gather over data, bytes: 4,194,304 -> 8,388,608" in capsys.readouterr().err
    entry = json.loads(budget.read_text())["figures"]["all-gather over data, bytes"]
    assert entry == {"limit": 8388608, "tolerance": 0.5}


def test_budgets_of_other_things_are_refused(config, compiler, capsys, tmp_path):
    other = tmp_path / "notes.json"
    other.write_text('{"kind": "notes"}')
    command = ["rehearse", config, "--gpu", "H100", "--hosts"]
    for option in ("--budget", "--write-budget"):
        assert cli.main([*command, "2", option, str(other)]) == 2
        assert f'"kind": "{KIND}"' in capsys.readouterr().err
    assert other.read_text() == '{"kind": "notes"}'
    budget = str(tmp_path / "budget.json")
    assert cli.main([*command, "1", "--write-budget", budget]) == 0
    assert cli.main([*command, "2", "--budget", budget]) == 2
    assert "of another rehearsal" in capsys.readouterr().err


def test_a_budget_of_another_cluster_is_refused_before_anything_is_compiled(config, compiler, capsys, tmp_path):
    budget = str(tmp_path / "budget.json")
    assert cli.main(["rehearse", config, "--gpu", "H100", "--hosts", "2", "--write-budget", budget]) == 0
    compiler[0].clear()
    assert cli.main(["rehearse", config, "--gpu", "H100", "--hosts", "1", "--budget", budget]) == 2
    assert "gpus 16 there, 8 here" in capsys.readouterr().err
    assert compiler[0] == []


def test_sigterm_ends_it_as_ctrl_c_does(config, monkeypatch, capsys):
    closed = []

    def compile_apart(case, **arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            closed.append(case)

    monkeypatch.setattr(rehearsal, "compile_apart", compile_apart)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["rehearse", config, "--gpu", "H100", "--hosts", "2"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(closed) == 1
    assert "interrupted" in capsys.readouterr().err
