"""Digests: the same on every layout, other for every other bit, of each device its own."""

from __future__ import annotations

import itertools
import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import ROOT, environment, run_json, run_processes
from training.digests import LAYOUTS

from mtx.config import schema
from mtx.mesh import make_mesh
from mtx.training.digest import Digester, Disagreement, Holder, describe

PROGRAM = "training/digests.py"
TYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "uint8", "int8", "float8_e4m3fn")


@pytest.fixture(scope="module")
def digest():
    """Of one array on one device."""
    mesh = make_mesh(schema.Mesh(data=1), jax.devices()[:1])
    digester = Digester(mesh)

    def one(values) -> str:
        return digester({"x": jax.device_put(values, NamedSharding(mesh, P()))}).leaf_digests()["x"]

    return one


def mix(h: int, shifts: tuple[int, int, int], factors: tuple[int, int]) -> int:
    for shift, factor in zip(shifts, factors):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h ^ (h >> shifts[2])


def expected_digest(words: np.ndarray) -> str:
    """Of unsigned words, by hand: digests are in checkpoints, so they may never change."""
    parts = []
    for shifts, factors in (
        ((16, 13, 16), (0x85EBCA6B, 0xC2B2AE35)),
        ((16, 15, 16), (0x7FEB352D, 0x846CA68B)),
    ):
        total = 0
        for index in itertools.product(*map(range, words.shape)):
            place = 0x9E3779B9
            for i in index:
                place = mix(place ^ i, shifts, factors)
            total += mix(int(words[index]) ^ place, shifts, factors)
        parts.append(f"{total % 2**32:08x}")
    return "".join(parts)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 4)])
def test_digest_is_what_it_is_defined_to_be(digest, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert digest(values) == expected_digest(values.view(np.uint32))
    assert digest(values.astype(jnp.bfloat16)) == expected_digest(values.astype(jnp.bfloat16).view(np.uint16))
    assert digest(values > 0) == expected_digest((values > 0).astype(np.uint8))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_counts(digest, dtype):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (3, 4, 8 * jnp.dtype(dtype).itemsize), np.uint8).view(dtype)
    before = digest(values)
    assert digest(values.copy()) == before
    for _ in range(40):
        changed = values.copy()
        changed.reshape(-1).view(np.uint8)[rng.integers(values.nbytes)] ^= 1 << rng.integers(8)
        assert digest(changed) != before


def test_zeros_of_either_sign_differ(digest):
    assert digest(np.zeros(4, np.float32)) != digest(-np.zeros(4, np.float32))


def test_what_trades_places_is_noticed(digest):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((4, 6, 5)).astype(np.float32)
    others = [values[[1, 0, 2, 3]], values[::-1], values[:, ::-1], values[..., ::-1], values[:, [1, 0, 2, 3, 4, 5]]]
    for _ in range(40):
        swapped = values.copy()
        one, other = (tuple(rng.integers(values.shape)) for _ in range(2))
        swapped[one], swapped[other] = values[other], values[one]
        if one != other:
            others.append(swapped)
    digests = {digest(other) for other in [values, *others]}
    assert len(digests) == len({other.tobytes() for other in others}) + 1


def test_equal_values_elsewhere_differ(digest):
    """A single one, in each place of an array of zeros."""
    found = {digest(np.float32(np.arange(60) == place).reshape(3, 4, 5)) for place in range(60)}
    assert len(found) == 60


NAMES = list(LAYOUTS)


@pytest.mark.parametrize(
    "names", [["one device", "pipe3 of uneven stages"], pytest.param(NAMES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_digests_are_the_same_on_every_layout_and_after_a_checkpoint(names):
    results = run_json(PROGRAM, "layouts", *names, devices=8)
    expected = results["one device"]["placed"]
    assert len(set(expected.values())) == len(expected) > 30
    assert "params/layers/attention/query/weight" in expected
    assert list(results) == names
    for name, result in results.items():
        assert result["placed"] == expected, name
        assert result["restored"] == expected, name
        assert "1 of " in result["message"], name
        assert "params/embedding/table differs from what was saved" in result["message"], name


def test_copies_that_differ_are_named():
    results = run_json(PROGRAM, "copies", devices=8)
    host = socket.gethostname()

    def found(*shards: tuple[int, list[int]]):
        return [
            {
                "leaf": "params/w",
                "copies": copies,
                "suspects": [{"device": device, "process": 0, "host": host} for device in devices],
            }
            for copies, devices in shards
        ]

    assert results["all equal"] == []
    assert results["one of eight"] == found((8, [5]))
    assert results["three of eight"] == found((8, [0, 1, 6]))
    assert results["four of eight"] == found((8, [0, 1, 2, 3, 4, 5, 6, 7]))  # no majority: all of them
    assert results["one of two"] == found((2, [0, 2]))
    assert results["two shards"] == found((4, [6]), (4, [1]))
    assert results["without copies"] == []


def test_two_processes_find_the_same():
    env = environment(2, MTX_COMPILATION_CACHE="")
    outputs = run_processes([str(ROOT / "tests" / PROGRAM), "processes"], count=2, env=env, timeout_s=120)
    one, other = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert one == other
    assert one["digests"] == run_json(PROGRAM, "processes", devices=4)["digests"]
    (found,) = one["disagreements"]
    (suspect,) = found["suspects"]
    assert (found["leaf"], found["copies"]) == ("w", 4)
    assert (suspect["process"], suspect["host"]) == (1, socket.gethostname())


def test_a_sentence_names_devices_and_hosts():
    bad, good = Holder(device=3, process=1, host="node7"), Holder(device=1, process=0, host="node6")
    disagreements = [
        Disagreement(leaf="params/a", copies=4, suspects=(bad,)),
        Disagreement(leaf="params/b", copies=4, suspects=(bad,)),
        Disagreement(leaf="params/c", copies=2, suspects=(good, bad)),
    ]
    assert describe(disagreements) == (
        "device 3 of process 1 on host node7: params/a (and 1 more) differs from its copies elsewhere; device 1 of "
        "process 0 on host node6, device 3 of process 1 on host node7: params/c differs from its copies elsewhere"
    )
