"""The command line: finding commands, exit codes, what is set before JAX starts; and `mtx config`."""

import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

from mtx import cli, errors
from mtx.commands import options
from mtx.config import reader

BASE = pathlib.Path(__file__).parent / "golden" / "config_mistakes" / "base.gin"
COMMANDS = sorted(cli.find_commands())


@pytest.fixture
def command(monkeypatch):
    """Makes `mtx try` the only command; its story is the given function."""

    def make(run):
        module = types.SimpleNamespace(NAME="try", HELP="tries", run=run, add_arguments=options.add_common_arguments)
        monkeypatch.setattr(cli, "find_commands", lambda: {"try": module})

    return make


def run_process(*arguments, **settings):
    command = [sys.executable, "-m", "mtx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, module in cli.find_commands().items():
        assert name in text
        assert module.HELP in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: mtx {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["config", "--help"], ["config", str(BASE)]])
def test_light_answers_import_nothing_heavy(arguments):
    program = (
        "import sys; from mtx.cli import main; code = main(sys.argv[1:]);"
        "print(*{'jax', 'numpy', 'optax'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    assert done.stdout


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert run_process("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confg"], "mtx: no command 'confg'; did you mean config?\n"),
        ([], "mtx: the following arguments are required: COMMAND; see `mtx --help`\n"),
        (["config", "x.gin", "--exlain", "Model"], "mtx: unknown arguments: --exlain Model; see `mtx config --help`\n"),
        (["config", "x.gin", "--expl", "Model"], "mtx: unknown arguments: --expl Model; see `mtx config --help`\n"),
        (["config", "--set"], "mtx: argument --set: expected one argument; see `mtx config --help`\n"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError, 2),
        (errors.DivergedError, 3),
        (errors.PreemptedError, 4),
        (errors.CheckpointError, 5),
    ],
)
def test_errors_become_exit_codes(error, code, command, capsys):
    def fail(args):
        raise error("what and why")

    command(fail)
    assert cli.main(["try"]) == code
    assert capsys.readouterr() == ("", "mtx: what and why\n")
    assert cli.main(["try", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": "what and why", "exit_code": code}
    assert captured.err == "mtx: what and why\n"


def test_result_is_the_exit_code(command):
    command(lambda args: 4)
    assert cli.main(["try"]) == 4


def test_interrupt(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "mtx: interrupted\n"


def test_bugs_keep_their_traceback(command):
    command(lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_broken_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mtx", "config", str(BASE)]
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_broken_pipes_are_bugs(command, capfd):
    def fail(args):
        raise BrokenPipeError("a socket")

    command(fail)
    with pytest.raises(BrokenPipeError):
        cli.main(["try"])


def test_cpu_devices_are_set_before_the_command_runs(command, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_flag_of_the_user=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    seen = []
    command(lambda args: seen.append((os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"])) or 0)
    assert cli.main(["try"]) == 0
    assert cli.main(["try", "--cpu-devices", "4"]) == 0
    assert seen == [
        ("--xla_flag_of_the_user=1", "cuda"),
        (
            "--xla_flag_of_the_user=1 --xla_force_host_platform_device_count=4 "
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            "cpu",
        ),
    ]


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_cpu_devices_are_a_positive_integer(count, command, capsys):
    command(lambda args: 0)
    assert cli.main(["try", "--cpu-devices", count]) == 2
    assert f"argument --cpu-devices: expected a positive integer, not '{count}'" in capsys.readouterr().err


def test_cpu_devices_reach_jax():
    program = (
        "import argparse; from mtx.commands import options; options.apply(argparse.Namespace(cpu_devices=3));"
        "import jax; print(len(jax.devices()), jax.devices()[0].platform)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "cpu"]


def test_answers_are_valid_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        options.print_json({"loss": float("nan")})


def test_config_prints_a_config(capsys, tmp_path):
    assert cli.main(["config", str(BASE), "--set", "Model.d_model = 32"]) == 0
    (tmp_path / "again.gin").write_text(capsys.readouterr().out)
    assert reader.load(tmp_path / "again.gin").run == reader.load(BASE, ["Model.d_model = 32"]).run


def test_config_json(capsys):
    assert cli.main(["config", str(BASE), "--set", "Model.d_model = 32", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["Model"]["d_model"] == 32
    assert answer["config"]["Train"]["optimizer"] == "@AdamW()"
    assert answer["config"]["AdamW"]["beta1"] == 0.9
    assert answer["provenance"]["Model.d_model"] == {
        "place": "<command line>",
        "through": [],
        "overrode": [{"value": "16", "place": f"{BASE}:2"}],
    }


def test_config_explains(capsys):
    assert cli.main(["config", str(BASE), "--explain", "Model.d_model", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["key"], answer["value"], answer["place"]) == ("Model.d_model", "16", f"{BASE}:2")
    assert cli.main(["config", str(BASE), "--explain", "Mesh", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [field["key"] for field in answer["fields"]][:2] == ["Mesh.pipe", "Mesh.data"]
    assert cli.main(["config", str(BASE), "--explain", "Model.d_modl"]) == 2
    assert capsys.readouterr().err == "mtx: Model has no field 'd_modl'; did you mean d_model?\n"
    assert cli.main(["config", str(BASE), "--explain", "Lion.beta1"]) == 0
    assert "nothing in this run refers to the class" in capsys.readouterr().out


def test_config_differences(capsys, tmp_path):
    (tmp_path / "other.gin").write_text(f"include '{BASE}'\nTrain.steps = 20\n")
    assert cli.main(["config", str(BASE), "--diff", str(tmp_path / "other.gin"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["differences"] == [
        {"key": "Train.steps", "value": "10", "other": "20", "on_resume": "may change freely"}
    ]


def test_module_is_the_program():
    done = run_process("config")
    assert done.returncode == 2
    assert done.stderr.startswith("mtx: no config given")
    assert "Traceback" not in done.stderr
