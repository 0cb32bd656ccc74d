"""How many GPUs a deadline or a budget takes."""

import dataclasses
import itertools

import pytest
import tiny

from mtx.errors import UserError
from mtx.planning.case import Cluster
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS
from mtx.planning.plan import make_plan
from mtx.planning.search import search_layouts
from mtx.planning.sizing import RUNG, list_counts, size_for_budget, size_for_deadline

CONSTANTS = Constants()
MODEL = {"vocab_size": 8192, "d_model": 1024, "num_layers": 4, "num_heads": 8, "max_seq_len": 1024}
TOKENS = 10**10
CLUSTER = Cluster.of(GPUS["H100"], 1)


@pytest.fixture(scope="module")
def run():
    train = {"seq_len": 1024, "global_batch_size": 32}
    return tiny.make_run(MODEL, precision={"compute": "bfloat16"}, train=train)


def measure(run, count):
    """Days and cost at a price of 2 with the fastest layout."""
    search = search_layouts(run, dataclasses.replace(CLUSTER, num_gpus=count), constants=CONSTANTS)
    plan = make_plan(search.ranked[0].case, CONSTANTS, tokens=TOKENS, price=2.0)
    return plan.days, plan.cost


def test_counts_are_whole_machines_one_in_each_rung(run):
    counts = list_counts(run, CLUSTER)
    assert counts[:4] == [1, 2, 4, 8]
    assert all(count % 8 == 0 for count in counts[4:])
    assert all(after / before > RUNG**0.5 for before, after in itertools.pairwise(counts))


def test_the_fewest_gpus_that_meet_a_deadline(run):
    days = 1.01 * measure(run, 8)[0]
    found = size_for_deadline(run, CLUSTER, TOKENS, days, constants=CONSTANTS)
    assert found.chosen.num_gpus == 8
    assert found.chosen.run_seconds <= days * 86400
    assert measure(run, 4)[0] > days
    assert [point.num_gpus for point in found.points] == sorted({point.num_gpus for point in found.points})
    document = found.as_json()
    assert [point["gpus"] for point in document if point["chosen"]] == [8]


def test_the_most_gpus_that_a_budget_pays(run):
    watched = []
    costs = {count: measure(run, count)[1] for count in (8, 16)}
    assert costs[16] > costs[8]
    found = size_for_budget(
        run, CLUSTER, TOKENS, (costs[8] + costs[16]) / 2, 2.0, constants=CONSTANTS, watch=watched.append
    )
    assert found.chosen.num_gpus == 8
    assert found.chosen.gpu_hours * 2 == pytest.approx(costs[8])
    assert found.chosen in watched


def test_what_cannot_be_met_is_said_with_the_best_that_there_is(run):
    with pytest.raises(UserError, match=r"no number of GPUs up to \d+.*more days"):
        size_for_deadline(run, CLUSTER, TOKENS, 1e-5, constants=CONSTANTS)
    with pytest.raises(UserError, match="does not pay for 10000000000 tokens: the cheapest"):
        size_for_budget(run, CLUSTER, TOKENS, 0.01, 2.0, constants=CONSTANTS)
