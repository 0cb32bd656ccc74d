"""Published runs become the cases that their rows describe, and their figures the seconds that their sources print."""

import csv
import math
import pathlib
import re

import pytest

from mtx.errors import UserError
from mtx.planning.conventions import hardware_flops
from mtx.planning.flops import model_flops_per_token
from mtx.planning.published import COLUMNS, read_runs

TABLE = pathlib.Path(__file__).parents[2] / "benchmarks" / "data" / "published_runs.csv"


@pytest.fixture(scope="module")
def runs():
    return {run.id: run for run in read_runs(TABLE)}


def write_table(path, *rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: row.get(name, "") for name in columns} for row in rows)
    return path


ROW = {
    "id": "sc21_new", "hardware": "A100-SXM-80GB", "peak_tflops_dense_bf16": "312", "precision": "fp16", "layers": "24",
    "hidden": "2304", "heads": "24", "vocab": "51200", "seq_len": "2048", "tp": "1", "pp": "1", "zero_or_fsdp": "none",
    "sequence_parallel": "no", "recompute": "full", "micro_batch": "16", "global_batch": "512", "num_gpus": "32",
    "tflops_per_gpu": "137", "notes": "flops_kind=hardware",
}  # fmt: skip


def read_one(tmp_path, **changes):
    return read_runs(write_table(tmp_path / "runs.csv", ROW | changes))[0]


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("sc21_t1_1.7B", 3.528),
        ("sc21_t1_7.5B", 3.696),
        ("sc21_t2_ptd_174B_384", 76.78),
        ("sc21_t2_ptd_529B_560", 206.2),
        ("mlm_sep20_8B_A100_dp1", 1.343),
        ("korthikanti_175B_selective", 13.75),
        ("dgxc_v25.04_llama3_8b_bf16_8", 12.27),
        ("pax_new_5B_A100_bf16-TE", 2048 / 718.19),
        ("bloom_176b_main", 2048 / 19.561),
        ("titan_8b_8g_FSDP_eager", 2 * 8192 / 5762),
        ("mosaic_h10080_70b_s2048_n64_bf16", 63.05),
    ],
)
def test_seconds_are_those_of_the_source(runs, name, seconds):
    assert runs[name].step_seconds == pytest.approx(seconds, rel=1e-3)


def test_seconds_are_those_that_the_table_derived(runs):
    """The table's notes carry seconds that were computed by hand; rounded to a millisecond."""
    derived = {
        name: float(found[1])
        for name, run in runs.items()
        if run.step_seconds and (found := re.search(r"derived_sec_per_iter[=~]([\d.]+)", run.row["notes"]))
    }
    assert len(derived) > 200
    assert {name: runs[name].step_seconds for name in derived} == pytest.approx(derived, rel=4e-3, abs=6e-4)


def utilization(run):
    whole = run.case.declared.definition.whole
    train = run.case.run.train
    flops = run.case.tokens_per_step * model_flops_per_token(
        run.case.run.model, whole.params, whole.axes, train.seq_len
    )
    peak = float(run.row["peak_tflops_dense_bf16"]) * 1e12
    return 100 * flops / run.step_seconds / run.case.cluster.num_gpus / peak


@pytest.mark.parametrize("name", ["mcore_h100_weak_16B", "korthikanti_175B_selective", "dgxc_v25.04_llama3_8b_bf16_8"])
def test_published_utilization_is_that_of_the_seconds(runs, name):
    """Both conventions at once: a wrong FLOP count would contradict the source's own percentage."""
    assert utilization(runs[name]) == pytest.approx(float(runs[name].row["mfu_pct"]), rel=0.012)


def test_hardware_flops_with_selective_recomputation(runs):
    """43.7 % HFU of 22B, as arXiv 2205.05198 prints it."""
    run = runs["korthikanti_22B_selective"]
    assert hardware_flops(run.case) / 1.10 / 8 / 312e12 == pytest.approx(0.437, rel=0.01)


def test_parameters_are_those_published(runs):
    """Exact where the source gives digits; the others are names of sizes."""
    for name, run in runs.items():
        published = run.row["params_b"]
        if run.case is None or not published or name.startswith("bloom_sweep"):
            continue  # the sweep names its runs after the layers, some by mistake
        counted = sum(math.prod(parameter.shape) for parameter in run.case.declared.parameters) / 1e9
        digits = len(published.replace(".", "").lstrip("0"))
        assert counted == pytest.approx(float(published), rel=1e-3 if digits > 4 else 0.045), name


def test_each_row_is_a_case_or_says_why(runs):
    assert len(runs) > 700
    for name, run in runs.items():
        assert (run.case is None) == bool(run.skipped), name
        assert run.case is not None or run.step_seconds is None, name
    assert sum(run.case is not None for run in runs.values()) > 500


@pytest.mark.parametrize(
    ("name", "reason"),
    [("palm_540b", "TPUv4"), ("mcore_mixtral8x7b_v0.8", "mixture of experts"), ("gpt3_175b_v100", "num_gpus")],
)
def test_reasons(runs, name, reason):
    assert reason in runs[name].skipped


@pytest.mark.parametrize(
    ("name", "sizes", "microbatches"),
    [
        ("sc21_t1_530B", {"pipe": 35, "tensor": 8, "data": 9}, 280),
        ("sc21_t2_zero3_174B_384", {"fsdp": 384}, 1),
        ("pax_new_5B_A100_bf16", {"fsdp": 256}, 1),
        ("pax_dgxc_5b_bf16_16", {"fsdp": 8, "data": 2}, 1),
        ("dgxc_v25.04_llama3_8b_bf16_8", {"context": 2, "data": 4}, 32),
        ("titan_8b_8g_cp2", {"context": 2, "fsdp": 4}, 1),
        ("mlm_jan21_530B", {"tensor": 8, "pipe": 35, "data": 9}, 280),
        ("bloom_sweep_187B_h13824_n40_tp8_pp10_mbs4_gbs2048_a64_02-21", {"tensor": 8, "pipe": 10, "data": 4}, 128),
    ],
)
def test_layouts(runs, name, sizes, microbatches):
    case = runs[name].case
    assert {axis: size for axis, size in case.sizes.items() if size > 1} == sizes
    assert case.num_microbatches == microbatches


def test_what_was_inferred_is_said(runs):
    assert runs["mlm_jan21_39B"].inferred == ("tp", "pp", "micro_batch")
    assert runs["bloom_sweep_187B_h13824_n40_tp8_pp10_mbs4_gbs2048_a64_02-21"].inferred == ("dp",)
    sweep = runs["bloom_sweep_200B_h14400_n40_tp8_pp10_mbs8_gbs2048_a_02-20"]
    assert sweep.inferred == ("layers", "heads")
    assert sweep.case.run.model.num_layers == 80


def test_misprints(runs):
    assert runs["bloom_sweep_18B_h14336_n1_tp8_pp1_mbs2_gbs2048_a64_02-21"].case.run.train.global_batch_size == 512
    assert runs["bloom_sweep_181B_h14336_n48_tp8_pp12_mbs2_gbs2048_a64_02-21_r2"].step_seconds is None
    assert [name for name, run in runs.items() if run.out_of_memory] == [
        "bloom_sweep_181B_h14336_n48_tp8_pp1_mbs1_gbs2016_a64_02-25",
        "bloom_sweep_206B_h14336_n48_tp4_pp12_mbs2_gbs2048_a128_02-28",
    ]


def test_what_only_the_source_knows_is_not_guessed(tmp_path):
    assert read_one(tmp_path, notes="").step_seconds is None
    assert read_one(tmp_path, notes="flops_kind=model").step_seconds == pytest.approx(3.528 * 0.755, rel=0.01)
    assert "hidden" in read_one(tmp_path, hidden="").skipped
    assert "does not divide" in read_one(tmp_path, tp="5").skipped


def test_an_unknown_source_is_taken_for_its_like(tmp_path):
    assert read_one(tmp_path, id="new", zero_or_fsdp="fsdp").case.software == "torchtitan-compile"
    assert read_one(tmp_path, id="new", hardware="H100-SXM-80GB").case.software == "nemo-2025"


@pytest.mark.parametrize("missing", ["tp", "notes"])
def test_missing_column(tmp_path, missing):
    columns = [name for name in COLUMNS if name != missing]
    with pytest.raises(UserError, match=rf"runs\.csv:1: no column {missing}"):
        read_runs(write_table(tmp_path / "runs.csv", columns=columns))


@pytest.mark.parametrize(
    ("column", "cell"), [("tp", "eight"), ("tp", "2.5"), ("layers", "-1"), ("sec_per_iter", "nan")]
)
def test_cells_that_are_no_numbers(tmp_path, column, cell):
    with pytest.raises(UserError, match=rf"runs\.csv:2: {column} is '{re.escape(cell)}'"):
        read_one(tmp_path, **{column: cell})


def test_a_torn_row(tmp_path):
    path = write_table(tmp_path / "runs.csv", ROW)
    path.write_text(path.read_text() + "sc21_torn,1,2\n")
    with pytest.raises(UserError, match=r"runs\.csv:3: .*cells"):
        read_runs(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv: No such file"):
        read_runs(tmp_path / "nothing.csv")
