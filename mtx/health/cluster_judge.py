"""What the reports of all processes of a job mean: which host is at fault, and what to do about it.

Decides which differences and which slowness are faults, and which are worth a remark only. Measures nothing and asks
no machine: plain data in, findings out.

Invariant: a finding names hosts, and has a cure.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

GPU_RATIO, CPU_RATIO = 0.85, 0.5
"""Of the median of the others: less is slow. Healthy GPUs of one kind differ by some percent, by temperature and power;
simulated CPU devices share the cores, so there it is only worth a remark."""
MAX_SKEW_S = 1.0
"""Clocks further apart make logs of several hosts hard to compare; a run itself compares no clocks."""
MIN_FREE_DISK_BYTES = 2 * 10**9
MIN_SHARED_MEMORY_BYTES = 10**9
"""As `mtx.health.machine` wants them of one machine."""
MIN_MEMORY_RATIO = 0.5
_LEAVE_OUT = "leave it out (`--exclude {hosts}`), or mend it"
_MAX_NAMED = 8

_ONE_ENVIRONMENT = "start the same environment on all hosts: one on a shared file system, or one container image"

# What must be equal everywhere: else a run fails, hangs or computes differently. Of the rest, a remark.
_SAME = {
    "devices": "see nvidia-smi on the odd hosts, and mend them or leave them out: --exclude {hosts}",
    "jax": _ONE_ENVIRONMENT,
    "jaxlib": _ONE_ENVIRONMENT,
    "mtx": _ONE_ENVIRONMENT,
    "CUDA plugin": _ONE_ENVIRONMENT,
    "XLA_FLAGS": "set XLA_FLAGS once, with the launcher's --env, and not in a file that one host reads at login",
}
_ALIKE = {
    "python": "start the same environment on all hosts",
    "driver": "update the NVIDIA driver of the odd hosts, or leave them out: --exclude {hosts}",
    "NCCL variables": "set them once, with the launcher's --env, if they are not meant to differ",
}
_RATES = {"matmul_tflops": ("matrix products", "TFLOP/s"), "memory_gbs": ("device memory", "GB/s")}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one process says. Sizes in bytes.

    Attributes:
        host: Name of its host, different for different hosts.
        platform: `gpu` or `cpu`.
        facts: What should be the same everywhere, by name; missing where it does not apply.
        loopback: What its host's own name resolves to, where that is loopback; None: it is not.
        blind: Why it does not see the run directory that process 0 sees; None: it does, or none was named.
        skew_s: Its clock less that of process 0.
        free_disk: Of the run directory; None: none was named.
        shared_memory: Size of /dev/shm; None: there is none.
        rates: Of each of its devices; empty: not measured.
    """

    process: int
    host: str
    platform: str
    facts: dict[str, str]
    proxies: list[str] = field(default_factory=list)
    loopback: str | None = None
    blind: str | None = None
    skew_s: float = 0.0
    free_disk: int | None = None
    shared_memory: int | None = None
    free_shared_memory: int | None = None
    free_memory: int = 0
    rates: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Links:
    """All-reduce bus bandwidths in 10^9 bytes/s: within each host, and between pairs of hosts."""

    within: dict[str, float] = field(default_factory=dict)
    between: list[tuple[str, str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something out of line. `fault`: a run would fail or be crippled; else it is a remark."""

    what: str
    hosts: list[str]
    fault: str
    cure: str
    is_fault: bool = True


def judge_before(reports: Sequence[Report]) -> list[Finding]:
    """What is wrong before anything is measured. Where one is a fault, collectives may hang: see `can_measure`."""
    findings = []
    for names, is_fault in ((_SAME, True), (_ALIKE, False)):
        for name, cure in names.items():
            findings += _compare(reports, name, cure, is_fault)
    hosts = _distinct(report.host for report in reports)
    looped = _distinct(r.host for r in reports if r.loopback is not None and r.platform == "cpu")
    if len(hosts) > 1 and looped:
        address = next(r.loopback for r in reports if r.loopback is not None)
        cure = "in /etc/hosts, give the host's own name the address by which the others reach it"
        fault = f"the host's own name resolves to {address}: the others would be told to connect to themselves"
        findings.append(Finding(what="host name", hosts=looped, fault=fault, cure=cure))
    proxied = _distinct(report.host for report in reports if report.proxies)
    if len(hosts) > 1 and proxied:
        names_set = ", ".join(_distinct(name for report in reports for name in report.proxies))
        cure = "add the hosts to no_proxy, or unset them for the job"
        fault = f"{names_set} set: may mislead what the processes meet by"
        findings.append(Finding(what="proxy", hosts=proxied, fault=fault, cure=cure, is_fault=False))
    return findings + _judge_folders(reports)


def can_measure(reports: Sequence[Report], findings: Sequence[Finding]) -> bool:
    """Whether collectives among all can be expected to work at all."""
    stops = {"host name", "jaxlib", "jax", "XLA_FLAGS"}
    return len({r.platform for r in reports}) == 1 and not any(f.is_fault and f.what in stops for f in findings)


def judge_after(reports: Sequence[Report], links: Links) -> list[Finding]:
    """What the clocks and the measured rates say."""
    findings = []
    late = _distinct(report.host for report in reports if abs(report.skew_s) > MAX_SKEW_S)
    if late:
        worst = max(reports, key=lambda report: abs(report.skew_s))
        fault = f"the clock differs from that of process 0, by {worst.skew_s:+.1f} s at most"
        cure = "start chrony or ntpd there"
        findings.append(Finding(what="clock", hosts=late, fault=fault, cure=cure, is_fault=False))
    on_gpu = all(report.platform == "gpu" for report in reports)
    if not on_gpu and len({report.host for report in reports}) == 1:
        return findings  # its devices share its cores
    ratio = GPU_RATIO if on_gpu else CPU_RATIO
    for key, (what, unit) in _RATES.items():
        places = [(r.host, r.process, i, rates[key]) for r in reports for i, rates in enumerate(r.rates)]
        usual = _medians([place[3] for place in places])
        slow = [(place, median) for place, median in zip(places, usual) if place[3] < ratio * median]
        if slow:
            (host, process, index, value), median = min(slow, key=lambda item: item[0][3])
            fault = f"{value:.3g} {unit} on device {index} of process {process} on {host}, others {median:.3g}"
            if len(slow) > 1:
                fault += f"; {len(slow)} devices are slow"
            findings.append(_slow(what, _distinct(place[0] for place, _ in slow), fault, on_gpu))
    usual = _medians(list(links.within.values()))
    weak = [(v, m, host) for (host, v), m in zip(links.within.items(), usual) if v < ratio * m]
    if weak:
        value, median, host = min(weak)
        fault = f"all-reduce of {value:.3g} GB/s among the devices of {host}, others {median:.3g}"
        findings.append(_slow("links within a host", [host for _, _, host in weak], fault, on_gpu))
    return findings + _judge_links(links.between, ratio, on_gpu)


def _judge_links(between: Sequence[tuple[str, str, float]], ratio: float, on_gpu: bool) -> list[Finding]:
    """A host all of whose links are slow is named itself; else a slow link is named by its two ends."""
    slow = [
        (pair, median)
        for pair, median in zip(between, _medians([value for _, _, value in between]))
        if pair[2] < ratio * median
    ]
    all_links = Counter(host for first, second, _ in between for host in (first, second))
    slow_links = Counter(host for (first, second, _), _ in slow for host in (first, second))
    bad = [host for host, count in slow_links.items() if count == all_links[host] and count > 1]
    findings = []
    if bad:
        touching = [(pair, median) for pair, median in slow if pair[0] in bad or pair[1] in bad]
        (first, second, value), median = min(touching, key=lambda item: item[0][2])
        fault = (
            f"all its links are slow: all-reduce of {value:.3g} GB/s between {first} and {second}, others {median:.3g}"
        )
        findings.append(_slow("network", bad, fault, on_gpu))
    for (first, second, value), median in slow:
        if first not in bad and second not in bad:
            fault = f"all-reduce of {value:.3g} GB/s between {first} and {second}, others {median:.3g}"
            cure = "look at the cable and the switch between them; leaving out one of the two (`--exclude`) avoids it"
            findings.append(Finding(what="link", hosts=[first, second], fault=fault, cure=cure, is_fault=on_gpu))
    return findings


def _judge_folders(reports: Sequence[Report]) -> list[Finding]:
    findings = []
    blind = [report for report in reports if report.blind is not None]
    if blind:
        hosts = _distinct(report.host for report in blind)
        cure = "put --run-dir on a file system that all hosts mount at the same path, and give all the same path"
        findings.append(Finding(what="run directory", hosts=hosts, fault=str(blind[0].blind), cure=cure))
    full = [(r.free_disk, r.host) for r in reports if r.free_disk is not None and r.free_disk < MIN_FREE_DISK_BYTES]
    if full:
        fault = f"{min(full)[0] / 1e9:.1f} GB free for the run directory: hardly any room for a checkpoint"
        hosts = _distinct(host for _, host in full)
        findings.append(Finding(what="disk", hosts=hosts, fault=fault, cure="free some disk, or move the run"))
    small = [
        (r.shared_memory, r.host)
        for r in reports
        if r.platform == "gpu" and r.shared_memory is not None and r.shared_memory < MIN_SHARED_MEMORY_BYTES
    ]
    if small:
        fault = f"/dev/shm has {min(small)[0] / 1e9:.2f} GB: too small for NCCL between the GPUs of a host"
        cure = "start the container with --shm-size=8g or --ipc=host"
        findings.append(Finding(what="shared memory", hosts=_distinct(h for _, h in small), fault=fault, cure=cure))
    usual = _medians([report.free_memory for report in reports])
    low = [(r.free_memory, m, r.host) for r, m in zip(reports, usual) if r.free_memory < MIN_MEMORY_RATIO * m]
    if low:
        free, median, _ = min(low)
        fault = f"{free / 1e9:.1f} GB of memory free, others {median / 1e9:.1f}"
        hosts, cure = _distinct(host for _, _, host in low), "see what else runs there"
        findings.append(Finding(what="memory", hosts=hosts, fault=fault, cure=cure, is_fault=False))
    return findings


def _compare(reports: Sequence[Report], name: str, cure: str, is_fault: bool) -> list[Finding]:
    """The hosts whose value is not the most frequent one; of equally frequent ones, that of process 0 counts."""
    values = [report.facts.get(name, "none") for report in reports]
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    odd = [(report.host, value) for report, value in zip(reports, values) if value != usual]
    if not odd:
        return []
    hosts, others = _distinct(host for host, _ in odd), ", ".join(_distinct(value for _, value in odd))
    cure = cure.format(hosts=_shorten(hosts))
    return [Finding(what=name, hosts=hosts, fault=f"{others}, others {usual}", cure=cure, is_fault=is_fault)]


def _slow(what: str, hosts: list[str], fault: str, on_gpu: bool) -> Finding:
    cure = _LEAVE_OUT.format(hosts=_shorten(hosts)) if on_gpu else "see what else runs there, and how it is connected"
    return Finding(what=what, hosts=hosts, fault=fault, cure=cure, is_fault=on_gpu)


def _medians(values: Sequence[float]) -> list[float]:
    """For each value the median of the others, so that two can be compared; of many, that of all is as good."""
    if len(values) > 32:
        return [statistics.median(values)] * len(values)
    others = ([*values[:index], *values[index + 1 :]] for index in range(len(values)))
    return [statistics.median(rest) if rest else 0.0 for rest in others]


def _distinct(items: object) -> list[str]:
    return list(dict.fromkeys(items))  # type: ignore[call-overload]


def _shorten(hosts: Sequence[str]) -> str:
    return ",".join(hosts[:_MAX_NAMED]) + (f",... ({len(hosts) - _MAX_NAMED} more)" if len(hosts) > _MAX_NAMED else "")
