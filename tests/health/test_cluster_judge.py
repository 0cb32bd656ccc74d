"""What reports of many processes mean, on made-up ones: no machine is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtx.health.cluster_judge import Links, Report, can_measure, judge_after, judge_before

FACTS = {
    "devices": "8 x NVIDIA H100", "python": "3.11.9", "jax": "0.10.2", "jaxlib": "0.10.2", "mtx": "1.0",
    "CUDA plugin": "jax-cuda13-plugin 0.10.2", "driver": "580.1", "XLA_FLAGS": "aa", "NCCL variables": "none",
}  # fmt: skip
GOOD = {"matmul_tflops": 700.0, "memory_gbs": 3000.0}


def cluster(count: int, platform: str = "gpu") -> list[Report]:
    """One process per host, which differ by some percent as healthy ones do."""
    return [
        Report(
            process=index,
            host=f"h{index}",
            platform=platform,
            facts=dict(FACTS),
            free_disk=10**13,
            shared_memory=10**11,
            free_memory=10**12 + index,
            rates=[
                {key: value * (1 - 0.01 * ((index + device) % 5)) for key, value in GOOD.items()} for device in range(8)
            ],
        )
        for index in range(count)
    ]


def ring(count: int, **slow: float) -> list[tuple[str, str, float]]:
    """Links of 350 GB/s; `slow` = `h3_h4=0.5`: factors."""
    pairs = [(f"h{index}", f"h{(index + 1) % count}") for index in range(count if count > 2 else 1)]
    return [(a, b, 350.0 * slow.get(f"{a}_{b}", 1.0)) for a, b in pairs]


@pytest.mark.parametrize("count", [1, 2, 3, 280])
def test_nothing_is_wrong_with_healthy_hosts(count):
    reports = cluster(count)
    links = Links(within={report.host: 450.0 for report in reports}, between=ring(count) if count > 1 else [])
    assert judge_before(reports) == []
    assert can_measure(reports, [])
    assert judge_after(reports, links) == []


@pytest.mark.parametrize(
    ("name", "value", "is_fault", "measures"),
    [
        ("devices", "7 x NVIDIA H100", True, True),
        ("devices", "8 x NVIDIA A100", True, True),
        ("jax", "0.11.2", True, False),
        ("jaxlib", "0.11.2", True, False),
        ("mtx", "0.9", True, True),
        ("CUDA plugin", None, True, True),
        ("XLA_FLAGS", "bb", True, False),
        ("python", "3.12.1", False, True),
        ("driver", "570.2", False, True),
        ("NCCL variables", "cc", False, True),
    ],
)
def test_the_host_that_differs_is_named(name, value, is_fault, measures):
    reports = cluster(280)
    del reports[77].facts[name]
    if value is not None:
        reports[77].facts[name] = value
    (finding,) = judge_before(reports)
    assert (finding.what, finding.hosts, finding.is_fault) == (name, ["h77"], is_fault)
    assert (value or "none") in finding.fault
    assert FACTS[name] in finding.fault
    assert finding.cure
    assert "{" not in finding.cure
    assert can_measure(reports, [finding]) is measures


def test_of_two_that_differ_process_0_is_right():
    reports = cluster(2)
    reports[1].facts["jax"] = "0.11.2"
    (finding,) = judge_before(reports)
    assert finding.hosts == ["h1"]


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("count", [2, 3, 280])
def test_one_slow_device_names_its_host(key, count):
    reports = cluster(count)
    reports[1].rates[5][key] *= 0.7
    (finding,) = judge_after(reports, Links())
    assert finding.hosts == ["h1"]
    assert finding.is_fault
    assert "device 5 of process 1 on h1" in finding.fault
    assert "--exclude h1" in finding.cure


def test_simulated_devices_are_slow_for_many_reasons():
    reports = cluster(3, "cpu")
    reports[1].rates[0]["matmul_tflops"] *= 0.7
    assert judge_after(reports, Links()) == []
    reports[1].rates[0]["matmul_tflops"] *= 0.5
    (finding,) = judge_after(reports, Links())
    assert (finding.hosts, finding.is_fault) == (["h1"], False)
    assert judge_after([replace(report, host="h") for report in reports], Links()) == []


@pytest.mark.parametrize("count", [3, 4, 280])
def test_a_host_all_of_whose_links_are_slow_is_named(count):
    (finding,) = judge_after(cluster(count), Links(between=ring(count, h0_h1=0.5, h1_h2=0.6)))
    assert (finding.what, finding.hosts, finding.is_fault) == ("network", ["h1"], True)
    assert "175 GB/s" in finding.fault


@pytest.mark.parametrize("count", [3, 4, 280])
def test_one_slow_link_is_named_by_its_ends(count):
    (finding,) = judge_after(cluster(count), Links(between=ring(count, h1_h2=0.5)))
    assert (finding.what, finding.hosts) == ("link", ["h1", "h2"])


def test_slow_links_within_a_host():
    reports = cluster(4)
    within = {report.host: 450.0 for report in reports} | {"h2": 200.0}
    (finding,) = judge_after(reports, Links(within=within))
    assert (finding.what, finding.hosts) == ("links within a host", ["h2"])


def test_clock():
    reports = cluster(280)
    reports[9] = replace(reports[9], skew_s=-3.5)
    reports[10] = replace(reports[10], skew_s=0.9)
    (finding,) = judge_after(reports, Links())
    assert (finding.what, finding.hosts, finding.is_fault) == ("clock", ["h9"], False)
    assert "-3.5 s" in finding.fault


@pytest.mark.parametrize(
    ("change", "what", "is_fault"),
    [
        ({"blind": "DIR is another folder"}, "run directory", True),
        ({"free_disk": 10**9}, "disk", True),
        ({"shared_memory": 64 * 2**20}, "shared memory", True),
        ({"free_memory": 10**11}, "memory", False),
        ({"proxies": ["https_proxy"]}, "proxy", False),
    ],
)
def test_what_one_host_lacks(change, what, is_fault):
    reports = cluster(280)
    reports[3] = replace(reports[3], **change)
    (finding,) = judge_before(reports)
    assert (finding.what, finding.hosts, finding.is_fault) == (what, ["h3"], is_fault)
    assert can_measure(reports, [finding])


def test_a_name_that_is_loopback_matters_to_cpu_devices_of_several_hosts():
    def looped(count, platform):
        return [replace(report, loopback="127.0.1.1") for report in cluster(count, platform)]

    (finding,) = judge_before(looped(2, "cpu"))
    assert finding.hosts == ["h0", "h1"]
    assert "127.0.1.1" in finding.fault
    assert not can_measure(looped(2, "cpu"), [finding])
    assert judge_before(looped(1, "cpu")) == []
    assert judge_before(looped(2, "gpu")) == []


def test_kinds_of_devices_that_have_no_collective_in_common():
    assert not can_measure([*cluster(1), *cluster(1, "cpu")], [])
