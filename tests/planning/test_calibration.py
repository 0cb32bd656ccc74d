"""Calibration files, and what a run that starts may expect by them."""

import dataclasses
import json
import math

import pytest
from tiny import GPT, make_run

from mtx.errors import UserError
from mtx.planning.calibration import Calibration, read_calibration, write_calibration
from mtx.planning.case import Case, Cluster
from mtx.planning.constants import Constants
from mtx.planning.forecast import forecast, journal_fields, read_peak_bytes
from mtx.planning.hardware import GPUS, Gpu
from mtx.planning.memory import estimate_memory
from mtx.planning.step_time import estimate_time

CPU = dataclasses.replace(
    GPUS["A100-80"], name="cpu (2 simulated devices)", device_kind="cpu", watts=None, float32_flops=1e10,
    dense_flops={"float32": 1e10, "bfloat16": 1e10}, measured_flops={"float32": 1e10, "bfloat16": 1e10},
)  # fmt: skip
CONSTANTS = Constants(matmul_efficiency=0.5, quality={"mtx@cpu": 0.7})
MACHINE = {"device_kind": "cpu", "num_devices": 2, "simulated": True}
SIZES = {"pipe": 1, "data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "machine.json"


@pytest.mark.parametrize("gpu", [CPU, None])
def test_what_is_written_is_read_again(path, gpu):
    calibration = Calibration(gpu, CONSTANTS, MACHINE, ({"name": "a", "step_seconds": 0.5},))
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_overwritten(path):
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_calibration(path, Calibration(None, CONSTANTS))
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="no folder"):
        write_calibration(path.parent / "none/x.json", Calibration(None, CONSTANTS))


@pytest.mark.parametrize(("change", "said"), [
    (lambda d: d.update(version=2), "it says 2"),
    (lambda d: d.pop("constants"), "'constants' and 'machine' are objects"),
    (lambda d: d["constants"].update(matmul_eficiency=1.0), "matmul_eficiency"),
    (lambda d: d["gpu"].update(color="red"), "color"),
    (lambda d: d["gpu"].pop("memory_bytes"), "lacks memory_bytes"),
    (lambda d: d["gpu"].update(memory_bandwidth="fast"), "memory_bandwidth = 'fast' is not a number"),
    (lambda d: d["gpu"].update(dense_flops=3), "dense_flops = 3 is not an object of numbers"),
    (lambda d: d["gpu"].update(name=None), "name = None is not text"),
    (lambda d: d["gpu"].update(memory_bytes=None), "memory_bytes = None is not a number"),
])  # fmt: skip
def test_files_that_are_no_calibration(path, change, said):
    write_calibration(path, Calibration(CPU, CONSTANTS, MACHINE))
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_calibration(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_files_that_are_something_else(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match="is no calibration"):
        read_calibration(path)
    with pytest.raises(UserError, match="--calibrate"):
        read_calibration(path.parent / "other.json")


def plan(gpu: Gpu, constants: Constants | None) -> tuple[float, int]:
    case = Case.of(make_run(GPT, mesh={"data": 2}), Cluster.of(gpu, 2))
    return estimate_time(case, constants).seconds, estimate_memory(case).total


def expect(kind: str, calibration=None, sizes=SIZES) -> tuple[float, int] | None:
    found = forecast(make_run(GPT), sizes, kind, calibration)
    return None if found is None else (found.step_seconds, found.memory_bytes)


def test_forecast_of_known_gpus(path):
    assert expect("NVIDIA H200") == plan(GPUS["H200"], None)
    write_calibration(path, Calibration(None, CONSTANTS, {"device_kind": "NVIDIA H200"}))
    assert expect("NVIDIA H200", path) == plan(GPUS["H200"], CONSTANTS) != plan(GPUS["H200"], None)
    assert expect("NVIDIA GB200", path) == plan(GPUS["GB200"], None)  # the constants are of other GPUs


def test_forecast_of_devices_that_are_in_no_table(path):
    assert expect("cpu") is None
    write_calibration(path, Calibration(CPU, CONSTANTS, MACHINE))
    assert expect("cpu", path) == plan(CPU, CONSTANTS)
    assert expect("NVIDIA H200", path) == plan(GPUS["H200"], None)
    assert expect("cpu", path, {**SIZES, "tensor": 2}) is None  # four simulated devices share what two had


def test_journal_fields():
    planned = forecast(make_run(GPT), SIZES, "NVIDIA H200")
    fields = journal_fields(planned, step_seconds=0.5, peak_bytes=7)
    assert fields == {
        "planned_step_seconds": planned.step_seconds, "step_seconds": 0.5, "planned_bytes": planned.memory_bytes,
        "peak_bytes": 7,
    }  # fmt: skip
    assert journal_fields(None, step_seconds=0.5, peak_bytes=None)["planned_bytes"] is None
    assert math.isfinite(planned.step_seconds)


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_peak_bytes():
    assert read_peak_bytes([Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 9})]) == 9
    assert read_peak_bytes([Device(None), Device({})]) is None
