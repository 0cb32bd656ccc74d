"""Groups of a mesh on the links of a cluster, and what exchanges over them take."""

import dataclasses

import pytest

from mtx.planning.case import Cluster
from mtx.planning.communication import Group, Network
from mtx.planning.constants import Constants
from mtx.planning.hardware import GPUS

SIZES = {"pipe": 2, "data": 4, "fsdp": 1, "expert": 2, "context": 1, "tensor": 4}
PERFECT = Constants(nvlink_efficiency=1.0, network_efficiency=1.0, nvlink_latency_s=0.0, network_latency_s=0.0)


def network(constants=PERFECT, sizes=SIZES, **cluster):
    return Network(Cluster.of(GPUS["H100"], 64, **cluster), sizes, constants)


@pytest.mark.parametrize(
    ("axes", "domain", "group"),
    [
        (("tensor",), 8, Group(4, 4)),
        (("expert",), 8, Group(2, 2)),  # a stride of 4: both are in a domain of 8
        (("data",), 8, Group(4, 1)),  # a stride of 8
        (("data", "expert"), 8, Group(8, 2)),
        (("data",), 72, Group(4, 4)),
        (("pipe",), 8, Group(2, 1)),
        (("tensor",), 2, Group(4, 2)),
        ((), 8, Group(1, 1)),
    ],
)
def test_a_group_has_as_many_members_in_a_domain_as_their_strides_allow(axes, domain, group):
    assert network(domain=domain).group(axes) == group


def test_a_gather_in_a_domain_takes_what_a_ring_takes():
    seconds = network().gather_seconds(1e9, ("tensor",))
    assert seconds == pytest.approx(1e9 * 3 / 4 / 450e9)
    assert network().reduce_seconds(1e9, ("tensor",)) == pytest.approx(2 * seconds)


def test_what_leaves_a_domain_is_shared_by_the_adapters_of_its_members():
    alone = network().gather_seconds(1e9, ("data",))
    assert alone == pytest.approx(1e9 * 3 / 4 / 50e9)
    assert network().gather_seconds(1e9, ("data", "expert")) == pytest.approx(alone / 2)
    flat = dataclasses.replace(network(), shares_adapters=False)
    assert flat.gather_seconds(1e9, ("data", "expert")) == pytest.approx(alone)


def test_hops_cost_their_latency():
    slow = dataclasses.replace(PERFECT, nvlink_latency_s=1e-6, network_latency_s=1e-5)
    assert network(slow).gather_seconds(0, ("data", "expert")) == pytest.approx(1e-6 + 3e-5)
    assert network(slow).permute_seconds(0, "pipe") == pytest.approx(1e-5)
    assert network(slow).permute_seconds(0, "tensor") == pytest.approx(1e-6)


def test_an_exchange_keeps_what_stays_here():
    assert network().exchange_seconds(1e9, ("expert",)) == pytest.approx(1e9 / 2 / 450e9)
    assert network().exchange_seconds(1e9, ("data", "expert")) == pytest.approx(1e9 * 6 / 8 / 50e9)


def test_nothing_is_exchanged_with_oneself():
    alone = network(Constants())
    assert alone.gather_seconds(1e9, ("context",)) == alone.exchange_seconds(1e9, ()) == 0
    assert alone.permute_seconds(1e9, "fsdp") == 0


@pytest.mark.parametrize("kind", ["gather_seconds", "reduce_seconds", "exchange_seconds"])
def test_slower_adapters_never_help(kind):
    times = [getattr(network(Constants(), nic_bandwidth=b), kind)(1e8, ("data", "expert")) for b in (1e9, 1e10, 1e11)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1]
