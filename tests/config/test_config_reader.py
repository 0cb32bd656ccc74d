"""Configs that load: grammar, composition, defaults, provenance, and the dump that loads again."""

import dataclasses
import math

import pytest

from mtx.config import reader, render, schema
from mtx.objectives.causal import Causal
from mtx.optim.adamw import AdamW
from mtx.optim.lion import Lion
from mtx.optim.warmup_cosine import WarmupCosine

SMALL = """
Model.vocab_size = 100
Model.d_model = 16
Model.num_layers = 2
Model.num_heads = 4
Model.max_seq_len = 64
Train.seq_len = 64
Train.global_batch_size = 8
Train.steps = 10
"""


def load(*lines, overrides=()):
    return reader.load_text(SMALL + "\n".join(lines), "small.gin", overrides)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.gin").write_text(text)

    return write


def test_values_and_defaults():
    run = load("Model.norm_eps = 1", "Rules.overrides = {'vocab': ['tensor', 'fsdp'], 'mlp': None}").run
    assert run.model.d_model == 16
    assert run.model.family == "decoder"
    assert run.model.norm_eps == 1.0
    assert isinstance(run.model.norm_eps, float)
    assert run.rules.overrides == {"vocab": ("tensor", "fsdp"), "mlp": None}
    assert run.mesh == schema.Mesh()


def test_optimizer_and_objective_are_always_there():
    run = load("AdamW.beta1 = 0.8").run
    assert run.train.optimizer == AdamW(beta1=0.8)
    assert run.train.objective == Causal()
    assert load("Train.optimizer = None").run.train.optimizer == AdamW()


def test_references():
    run = load(
        "Train.optimizer = @Lion()",
        "Lion.learning_rate = @WarmupCosine()",
        "WarmupCosine.peak = 1e-3",
        "Model.position = 'rotary'",
        "Model.rope_scaling = @RopeScaling()",
        "RopeScaling.factor = 4",
    ).run
    assert run.train.optimizer == Lion(learning_rate=WarmupCosine(peak=1e-3))
    assert run.model.rope_scaling == schema.RopeScaling(factor=4.0)


def test_blocks_comments_and_continued_lines():
    run = load(
        "Mesh:  # block", "  data = 2", "  # comment", "  tensor = 4", "Data.train = {", "  'a': 1,  # one", "}"
    ).run
    assert (run.mesh.data, run.mesh.tensor) == (2, 4)
    assert run.data.train == {"a": 1.0}


def test_macros_resolve_late_and_through_each_other():
    config = load("Model.d_ff = %WIDE", "WIDE = %BASE", "BASE = 32", "Train.optimizer = %OPT", "OPT = @AdamW()")
    assert config.run.model.d_ff == 32
    assert config.run.train.optimizer == AdamW()
    assert config.provenance["Model.d_ff"].through == ("%WIDE (small.gin:11)", "%BASE (small.gin:12)")
    overridden = load("Model.d_ff = %WIDE", "WIDE = 32", overrides=["WIDE = 64"])
    assert overridden.run.model.d_ff == 64
    assert overridden.provenance["Model.d_ff"].through == ("%WIDE (<command line>, over 32 (small.gin:11))",)


def test_macros_in_containers():
    run = load("STORE = 'books'", "SHARE = 0.5", "Data.train = {%STORE: %SHARE}").run
    assert run.data.train == {"books": 0.5}


def test_includes_are_relative_to_the_including_file(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "width.gin").write_text("Model.d_model = 32\n")
    (tmp_path / "models" / "small.gin").write_text(SMALL.replace("Model.d_model = 16", "include 'width.gin'"))
    (tmp_path / "runs" / "run.gin").write_text("include '../models/small.gin'\nModel.d_model = 48\n")
    monkeypatch.chdir(tmp_path)
    config = reader.load("runs/run.gin", ["Model.d_model = 64"])
    assert config.run.model.d_model == 64
    assert config.provenance["Model.d_model"] == render.Origin(
        "<command line>", (), (("48", "runs/run.gin:2"), ("32", "models/width.gin:1"))
    )
    assert config.provenance["Model.vocab_size"].place == "models/small.gin:2"
    assert "Model.family" not in config.provenance


def test_replaced_components_leave_no_mistake(write):
    write(base=SMALL + "AdamW.learning_rate = @WarmupCosine()\nWarmupCosine.peak = 1e-3\n")
    assert reader.load("base.gin", ["AdamW.learning_rate = 2e-4"]).run.train.optimizer == AdamW(learning_rate=2e-4)
    write(top="include 'base.gin'\nTrain.optimizer = @Lion()\n")
    config = reader.load("top.gin")
    assert isinstance(config.run.train.optimizer, Lion)
    assert "AdamW.learning_rate" not in config.provenance


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Data.train = {'%s': 0.5, 'b': 2}" % ("long/" * 30), "Data.validation = {'é \"': 'it\\'s'}"],
        [
            "Rules.overrides = {'vocab': ('tensor',), 'mlp': None}",
            "Model.norm_eps = 1e-300",
            "Tokenizer.path = '\\ud800'",
        ],
        ["Train.optimizer = @Lion()", "Lion.learning_rate = @WarmupCosine()", "WarmupCosine.peak = 0.1"],
        [
            *("Model.position = 'rotary'", "Model.rope_scaling = @RopeScaling()", "Train.batch_ramp = @BatchRamp()"),
            *("BatchRamp.start = 2", "BatchRamp.increment = 3", "BatchRamp.tokens = 9", "Train.microbatch_size = 1"),
        ],
    ],
)
def test_dump_loads_to_an_equal_run(lines):
    config = reader.load_text(SMALL + "\n".join(lines), "odd\nname.gin")
    again = reader.load_text(config.text(), "config.gin")
    assert again.run == config.run
    assert reader.load_text(again.text(), "config.gin").text() == again.text()


def test_dump_shows_every_field_and_where_it_comes_from():
    config = load("AdamW.beta1 = 0.8", overrides=["Model.d_model = 32"])
    lines = {line.split(" = ")[0]: line for line in config.text().splitlines() if " = " in line}
    for section in (*dataclasses.fields(schema.Run),):
        node = getattr(config.run, section.name)
        assert {f"{type(node).__name__}.{f.name}" for f in dataclasses.fields(node)} <= set(lines)
    assert lines["Model.d_model"].split("#")[1].strip() == "<command line>, over 16 (small.gin:3)"
    assert lines["AdamW.beta1"].split("#")[1].strip() == "small.gin:10"
    assert lines["AdamW.beta2"].split("#")[1].strip() == "default"
    assert lines["Train.optimizer"].startswith("Train.optimizer = @AdamW()")


def test_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().run.model.d_model = 3


def test_nothing_is_executed_or_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["import trap", "from trap import x", "Tokenizer.path = __import__('trap')", "Model.d_ff = (lambda: 3)()"]
    with pytest.raises(reader.UserError) as caught:
        load(*lines, overrides=["import trap"])
    assert str(caught.value).startswith("5 mistakes")


def test_differences():
    one, other = (
        load("Data.train = {'a': 1, 'b': 2}"),
        load("Data.train = {'b': 2, 'a': 1}", overrides=["Train.seed = 1"]),
    )
    changed = [(d.setting.key, render.show(d.old), render.show(d.new)) for d in render.compare(one.run, other.run)]
    weights = ("{'a': 1.0, 'b': 2.0}", "{'b': 2.0, 'a': 1.0}")  # in another order sources take turns otherwise
    assert changed == [("Train.seed", "0", "1"), ("Data.train", *weights)]
    assert render.compare(one.run, one.run) == []
    lion = load("Data.train = {'a': 1, 'b': 2}", "Train.optimizer = @Lion()")
    found = {d.setting.key: (render.show(d.old), render.show(d.new)) for d in render.compare(one.run, lion.run)}
    assert found["Train.optimizer"] == ("@AdamW()", "@Lion()")
    assert found["AdamW.eps"] == ("1e-08", "(not part of the run)")
    assert found["Lion.beta1"][0] == "(not part of the run)"
    assert "Model.d_model" not in found


def test_numbers_are_finite():
    assert math.isfinite(load("Model.init_std = 1e308").run.model.init_std)
    with pytest.raises(reader.UserError, match="not inf"):
        load("Model.init_std = 1e309")
