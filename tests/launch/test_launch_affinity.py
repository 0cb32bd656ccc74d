"""Cores near GPUs, on made-up trees of /proc and /sys."""

import os
import subprocess
import sys

import pytest
from programs import ROOT

from launch import affinity

UUID = "GPU-{:08x}-0000-0000-0000-000000000000"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_tree(root, nodes, cpulists, *, threads=1, models=None):
    """A machine: the NUMA node of each GPU, the cores of each node, hardware threads of a core (N, N + half)."""
    for index, node in enumerate(nodes):
        address = f"0000:{16 * index + 0x1B:02X}:00.0"
        model = models[index] if models else "NVIDIA H100 80GB HBM3"
        text = f"Model: \t\t {model}\nIRQ:   \t\t 18\nGPU UUID: \t {UUID.format(index)}\nDevice Minor: \t {index}\n"
        write(root / f"proc/driver/nvidia/gpus/{address}/information", text)
        write(root / f"sys/bus/pci/devices/{address.lower()}/numa_node", f"{node}\n")
        write(root / f"dev/nvidia{index}", "")
        write(root / f"sys/class/infiniband/mlx5_{index}/device/numa_node", f"{node}\n")
    cores = []
    for node, cpulist in enumerate(cpulists):
        write(root / f"sys/devices/system/node/node{node}/cpulist", f"{cpulist}\n")
        cores += affinity._read_list(root / f"sys/devices/system/node/node{node}/cpulist")
    half = len(cores) // threads
    for core in cores:
        siblings = sorted({core % half, core % half + half}) if threads == 2 else [core]
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        write(path, ",".join(map(str, siblings)) + "\n")
    return root


def near(root, shares, allowed=range(1000), **more):
    environment = more.pop("environment", {})
    found = [
        affinity.cores_near(shares, local, root=root, allowed=set(allowed), environment=environment)
        for local in range(len(shares))
    ]
    assert not more
    return found


@pytest.fixture
def server(tmp_path):
    """Eight GPUs on two nodes, eight cores with two hardware threads each."""
    return make_tree(tmp_path, [0, 0, 0, 0, 1, 1, 1, 1], ["0-3,8-11", "4-7,12-15"], threads=2)


def test_processes_of_a_node_share_its_cores_evenly(server):
    shares = near(server, list("01234567"))
    assert shares == [(0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15)]
    assert near(server, ["0,1", "2,3", "4,5", "6,7"]) == [
        (0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)
    ]  # fmt: skip


def test_only_cores_that_this_process_may_use(server):
    assert near(server, ["0", "1"], allowed=[0, 1, 2, 8]) == [(0, 8), (1, 2)]
    assert near(server, ["0", "7"], allowed=[0, 1]) == [(0, 1), ()]
    # more processes than cores: each may use all of them
    assert near(server, ["0", "1", "2"], allowed=[3, 11]) == [(3, 11), (3, 11), (3, 11)]


def test_gpus_by_uuid_and_beginnings_of_it(server):
    assert near(server, [UUID.format(5), "GPU-00000001"]) == [(4, 5, 6, 7, 12, 13, 14, 15), (0, 1, 2, 3, 8, 9, 10, 11)]
    assert near(server, ["GPU-0000000", "MIG-00000001-0000"]) == [(), ()]


@pytest.mark.parametrize("share", ["", "3,4", "8", "99", "0,x", "-1"])
def test_what_is_not_of_one_node_is_not_bound(server, share):
    assert near(server, [share]) == [()]


def test_machines_that_do_not_say(tmp_path, server):
    assert near(tmp_path / "nothing", ["0"]) == [()]
    alone = make_tree(tmp_path / "alone", [-1], ["0-3"])
    assert near(alone, ["0"]) == [()]
    (server / "sys/devices/system/node/node0/cpulist").write_text("what?\n")
    assert near(server, ["0", "4"]) == [(), (4, 5, 6, 7, 12, 13, 14, 15)]


def test_numbers_count_in_the_order_of_addresses_only_among_equals(tmp_path):
    root = make_tree(tmp_path, [0, 1], ["0-1", "2-3"], models=["NVIDIA H100", "NVIDIA A100"])
    assert near(root, ["0", "1"]) == [(), ()]  # CUDA puts the fastest first
    assert near(root, ["0", "1"], environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [(0, 1), (2, 3)]
    assert near(root, [UUID.format(1)]) == [(2, 3)]


def test_gpus_of_another_container_do_not_count(server):
    for index in range(4):
        (server / f"dev/nvidia{index}").unlink()
    assert near(server, ["0"]) == [(4, 5, 6, 7, 12, 13, 14, 15)]
    assert len(affinity.find_gpus(server)) == 4


def test_report_names_what_is_near(server):
    lines = affinity.report(server).splitlines()
    assert len(lines) == 8
    assert lines[5].startswith("GPU 5 0000:6b:00.0 NVIDIA H100 80GB HBM3: NUMA node 1, ")
    assert lines[5].endswith("InfiniBand near: mlx5_4 mlx5_5 mlx5_6 mlx5_7")


def test_a_process_is_bound(tmp_path):
    """For real, to a core that this machine has."""
    core = min(os.sched_getaffinity(0))
    root = make_tree(tmp_path / "tree", [0], [str(core)])
    program = (
        "import os, sys; from pathlib import Path; from launch import affinity, worker;"
        "near = affinity.cores_near;"
        f"affinity.cores_near = lambda shares, local: near(shares, local, root=Path({str(root)!r}));"
        "sys.exit(worker.main(sys.argv[1:]))"
    )
    words = ["--node", "0", "--gpus-per-node", "1", "--processes-per-node", "1", "--logs", str(tmp_path / "logs")]
    child = "import os; print('cores', *sorted(os.sched_getaffinity(0)))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}  # one of two: so that it is given its own
    environment.pop("JAX_PLATFORMS", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--coordinator", "h:1", "--", sys.executable, "-c", child],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"cores {core}\n" in done.stdout, done.stderr
