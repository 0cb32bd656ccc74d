"""Every shipped model, built abstractly at full size, has the parameters that were published for it."""

import csv
import math
import re
from functools import cache
from pathlib import Path

import jax
import pytest

from mtx.config.reader import load_text
from mtx.models import abstract_parameters
from mtx.planning.flops import count_matmul_parameters

ROOT = Path(__file__).parents[2]
ZOO = {row["file"]: row for row in csv.DictReader((ROOT / "tests/golden/zoo.csv").read_text().splitlines())}
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


@every_model
def test_multiplied_parameters_are_those_of_the_formula(name):
    model = load(name)
    width, ff = model.d_model, model.ff_width
    attention = width * model.head_width * 2 * (model.num_heads + model.kv_heads)
    layer = attention + (3 if model.gated else 2) * width * ff
    assert count_matmul_parameters(*abstract_parameters(model)) == model.num_layers * layer + width * model.vocab_size


def test_table_covers_the_files_and_the_docs_repeat_it():
    assert {path.stem for path in (ROOT / "configs/models").glob("*.gin")} == set(ZOO)
    docs = dict(re.findall(r"^\| [^|]+ \| `(\w+)\.gin` \| ([\d,]+) \|", (ROOT / "docs/models.md").read_text(), re.M))
    assert docs == {name: f"{int(row['computed']):,}" for name, row in ZOO.items()}
    for name, count in docs.items():
        head = (ROOT / f"configs/models/{name}.gin").read_text().splitlines()[0]
        assert f" {count} parameters" in head, name
