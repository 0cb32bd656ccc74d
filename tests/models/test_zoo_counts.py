"""Every shipped model, built abstractly at full size, has the parameters that were published for it."""

import csv
import math
import re
from functools import cache
from pathlib import Path

import jax
import pytest

from mtx.config.reader import load_text
from mtx.models import abstract_parameters, count_active_parameters
from mtx.planning.flops import count_matmul_parameters

ROOT = Path(__file__).parents[2]
ZOO = {row["file"]: row for row in csv.DictReader((ROOT / "tests/golden/zoo.csv").read_text().splitlines())}
WITH_EXPERTS = [name for name, row in ZOO.items() if row["active"]]
every_model = pytest.mark.parametrize("name", ZOO)


@cache
def load(name):
    path = ROOT / "configs/models" / f"{name}.gin"
    run = f"include '{path}'\nTrain.steps = 1\nTrain.seq_len = 8\nTrain.global_batch_size = 1\n"
    return load_text(run, f"{name} in a run").run.model


@every_model
def test_count_is_the_published_one(name):
    row, (params, _) = ZOO[name], abstract_parameters(load(name))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == int(row["computed"])
    assert abs(count - int(row["published"])) <= int(row["tolerance"]), row["reason"]


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_active_count_is_the_published_one(name):
    row, count = ZOO[name], count_active_parameters(load(name))
    assert count == int(row["active"])
    assert abs(count - int(row["active_published"])) <= int(row["active_tolerance"])


def test_only_models_with_experts_have_idle_parameters():
    assert {name for name in ZOO if load(name).num_experts} == set(WITH_EXPERTS)
    assert count_active_parameters(load("llama2_7b")) == int(ZOO["llama2_7b"]["computed"])


@every_model
def test_multiplied_parameters_are_those_of_the_formula(name):
    model = load(name)
    width, ff = model.d_model, model.ff_width
    attention = width * model.head_width * 2 * (model.num_heads + model.kv_heads)
    matrices = (3 if model.gated else 2) * width
    used = model.experts_per_token + model.num_shared_experts
    mlp = {
        "layers": matrices * ff,
        "expert_layers": used * matrices * (model.expert_d_ff or ff) + width * model.num_experts,
    }
    layers = sum(attention + mlp[stack] for stack in model.layer_stacks)
    assert count_matmul_parameters(model, *abstract_parameters(model)) == layers + width * model.vocab_size


def test_table_covers_the_files_and_the_docs_repeat_it():
    assert {path.stem for path in (ROOT / "configs/models").glob("*.gin")} == set(ZOO)
    docs = dict(re.findall(r"^\| [^|]+ \| `(\w+)\.gin` \| ([\d,]+) \|", (ROOT / "docs/models.md").read_text(), re.M))
    assert docs == {name: f"{int(row['computed']):,}" for name, row in ZOO.items()}
    active = dict(re.findall(r"^\| `(\w+)\.gin` \| .* \| ([\d,]+) \|", (ROOT / "docs/models.md").read_text(), re.M))
    assert active == {name: f"{int(ZOO[name]['active']):,}" for name in WITH_EXPERTS}
    for name, count in docs.items():
        head = (ROOT / f"configs/models/{name}.gin").read_text().splitlines()[0]
        assert f" {count} parameters" in head, name
