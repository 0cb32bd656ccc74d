"""The layout search: it finds what trying everything finds, and says why the rest is out."""

import dataclasses
import itertools
import time

import pytest
import tiny

from mtx.config import reader, schema
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS
from mtx.planning.memory import estimate_memory
from mtx.planning.plan import USABLE, usable_bytes
from mtx.planning.search import (
    MARGIN,
    RECOMPUTE,
    find_misfit,
    lay_out,
    list_meshes,
    list_microbatch_sizes,
    list_virtual_stages,
    search_layouts,
)
from mtx.planning.step_time import estimate_time

CONSTANTS = Constants()
DENSE = {"vocab_size": 8192, "d_model": 2048, "num_layers": 4, "num_heads": 16, "max_seq_len": 1024}
EXPERTS = {**DENSE, "num_layers": 2, "num_experts": 4, "experts_per_token": 1, "expert_capacity_factor": 1.25}


def make_run(model, **train):
    train = {"seq_len": 1024, "global_batch_size": 8, **train}
    return tiny.make_run(model, precision={"compute": "bfloat16"}, train=train)


def make_cluster(num_gpus, gib=80.0, domain=4):
    gpu = dataclasses.replace(GPUS["A100-40"], memory_bytes=int(gib * 2**30))
    return Cluster.of(gpu, num_gpus, domain=domain)


def make_tight_cluster(run, num_gpus, share):
    """GPUs on which this share of the layouts fits."""
    ample = search_layouts(run, make_cluster(num_gpus), constants=CONSTANTS, keep=1000)
    sizes = sorted(candidate.memory.total for candidate in ample.ranked)
    return make_cluster(num_gpus, sizes[int(share * len(sizes))] / 2**30 / USABLE / (1 - MARGIN))


def try_everything(run, cluster):
    """Seconds of the fastest that fits, by mesh, microbatch and virtual stages, ascending."""
    fastest = {}
    for sizes in list_meshes(run, cluster.num_gpus):
        plain = lay_out(run, sizes, microbatch_size=1)
        if cluster.domain % sizes["tensor"] or find_misfit(plain, sizes):
            continue
        options = itertools.product(list_microbatch_sizes(plain, sizes), list_virtual_stages(plain, sizes["pipe"]))
        for microbatch_size, virtual_stages in options:
            fixed = {"microbatch_size": microbatch_size, "virtual_stages": virtual_stages}
            for recompute, zero in itertools.product(RECOMPUTE, (0, 1, 2)):
                laid = lay_out(run, sizes, **fixed, recompute=recompute, zero=zero)
                case = Case(laid, cluster)
                if find_misfit(laid, sizes) or estimate_memory(case).total > (1 - MARGIN) * usable_bytes(cluster.gpu):
                    continue
                key = (*sizes.values(), microbatch_size, virtual_stages)
                fastest[key] = min(fastest.get(key, float("inf")), estimate_time(case, CONSTANTS).seconds)
    return sorted(fastest.values())


@pytest.mark.parametrize(("model", "share"), [(DENSE, 0.2), (DENSE, 0.7), (EXPERTS, 0.5)])
def test_the_search_finds_what_trying_everything_finds(model, share):
    run = make_run(model)
    cluster = make_tight_cluster(run, 4, share)
    expected = try_everything(run, cluster)
    assert len(expected) > 3
    for keep in (1, 4, 1000):
        found = search_layouts(run, cluster, constants=CONSTANTS, keep=keep)
        seconds = [candidate.step.seconds for candidate in found.ranked]
        assert seconds == pytest.approx(expected[:keep])
    assert any(rejection.kind == "does not fit" for rejection in found.rejected)


def test_recomputation_trades_time_for_memory():
    """What the search takes for granted: to compute more again is slower and smaller."""
    run, cluster = make_run(DENSE), make_cluster(8, 80)
    found = search_layouts(run, cluster, constants=CONSTANTS, keep=1000)
    assert len(found.ranked) > 50
    for candidate in found.ranked[::5]:
        mesh = dict(candidate.case.sizes)
        train, chunks = candidate.case.run.train, candidate.case.run.pipeline.virtual_stages
        fixed = {"microbatch_size": train.microbatch_size, "virtual_stages": chunks}
        cases = [Case(lay_out(run, mesh, **fixed, recompute=r, zero=2), cluster) for r in RECOMPUTE]
        seconds = [estimate_time(case, CONSTANTS).seconds for case in cases]
        sizes = [estimate_memory(case).total for case in cases]
        assert seconds == sorted(seconds)
        assert sizes == sorted(sizes, reverse=True)


def test_every_layout_is_ranked_or_rejected_with_a_reason():
    run = make_run(DENSE, global_batch_size=24)
    found = search_layouts(run, make_tight_cluster(run, 8, 0.1), constants=CONSTANTS, keep=3)
    assert len(found.ranked) == 3
    assert {"does not fit", "tensor leaves NVLink", "slower"} <= set(found.counts)
    assert any(kind.startswith("refused: Train.global_batch_size") for kind in found.counts)
    assert sum(found.counts.values()) == len(found.rejected)
    assert all(rejection.reason for rejection in found.rejected)
    too_large = [r for r in found.rejected if r.kind == "does not fit" and r.candidate]
    assert all("more than a layout may fill" in r.reason and "largest part" in r.reason for r in too_large)


def test_the_lines_of_a_layout_make_it():
    config = "configs/runs/mt_nlg_530b.gin"
    run = reader.load(config, ["Train.batch_ramp = None"]).run
    found = search_layouts(run, Cluster.of(GPUS["A100-80"], 560), constants=CONSTANTS, keep=2)
    for candidate in found.ranked:
        again = reader.load(config, ["Train.batch_ramp = None", *found.lines(candidate)]).run
        assert again == candidate.case.run


def test_options_of_axes_that_a_mesh_lacks_go_back_to_their_defaults():
    sections = {"pipeline": {"virtual_stages": 2, "head": "last"}, "train": {"context_exchange": "all_to_all"}}
    run = tiny.make_run(tiny.GPT, mesh={"pipe": 1, "context": 2}, **sections)
    laid = lay_out(run, {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1})
    assert (laid.pipeline.virtual_stages, laid.pipeline.head) == (1, "sharded")
    assert laid.train.context_exchange == "ring"
    scanned = dataclasses.replace(run, train=dataclasses.replace(run.train, scan_layers=True))
    laid = lay_out(scanned, {"pipe": 2, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1})
    assert laid.train.scan_layers is None
    assert laid.pipeline.head == "last"


def test_where_nothing_fits_the_closest_is_named():
    found = search_layouts(make_run(DENSE), make_cluster(2, 1), constants=CONSTANTS)
    assert found.ranked == ()
    sizes = [r.candidate.memory.total for r in found.rejected if r.candidate]
    assert found.closest.candidate.memory.total == min(sizes)


def test_a_kernel_that_cannot_refuses():
    run = make_run({**DENSE, "head_dim": 160}, attention="cudnn")
    found = search_layouts(run, make_cluster(2, 80), constants=CONSTANTS)
    assert found.ranked == ()
    assert "head_dim 160" in next(r.reason for r in found.rejected if r.kind == "no kernel")


def test_chunks_leave_no_more_slots_empty():
    run = make_run({**DENSE, "num_layers": 105})
    assert list_virtual_stages(run, 35) == [1, 3]
    assert list_virtual_stages(run, 1) == [1]
    assert list_virtual_stages(run, 53) == [1]


def test_microbatches_divide_every_batch_of_a_ramp():
    ramp = schema.BatchRamp(start=12, increment=12, tokens=10**6)
    run = make_run(DENSE, global_batch_size=48, batch_ramp=ramp)
    sizes = {"pipe": 1, "data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert list_microbatch_sizes(run, sizes) == [1, 2, 3, 6]


def test_the_flagship_is_searched_in_seconds():
    run = reader.load("configs/runs/mt_nlg_530b.gin").run
    begin = time.process_time()
    found = search_layouts(run, Cluster.of(GPUS["H100"], 2240))
    assert time.process_time() - begin < 10
    assert found.ranked
