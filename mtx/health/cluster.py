"""All processes of a job examine their hosts and each other, before a run.

Decides the order: first what needs no JAX (can process 0 be reached?), then what needs no collective (what is where,
clocks, the run directory), then rates of devices and links. What comes first is what explains the failures of the rest.

Invariant: all processes return the same verdict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.health import cluster_judge as judging
from mtx.health import machine
from mtx.health.cluster_judge import Finding, Links, Report
from mtx.health.cluster_meeting import FOLDER, WAITING, Channel, Watch, find_proxies, own_address, reach
from mtx.mesh import ENVIRONMENT, start_process

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_SEE_S = 5.0
"""For a file of another host to appear: NFS clients keep what they know of a folder for seconds (nfs(5), acdirmin)."""
_PATHS = ("--xla_dump_to", "--xla_gpu_dump", "--xla_gpu_per_fusion_autotune_cache_dir")


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found; `reports` are empty on other processes than the first. `ok` is the same on all."""

    ok: bool
    reports: Sequence[Report]
    links: Links
    findings: Sequence[Finding]
    seconds: dict[str, float]


def examine_cluster(run_dir: Path | None, *, timeout_s: float, complain: Callable[[str], None]) -> Examination:
    """Examines all hosts of the job that the launcher's variables tell of. Collective; starts JAX.

    Args:
        run_dir: Has to be the same folder for all processes; made where it is missing. None: none is looked at.
        timeout_s: How long each stage may take. A process that waits longer ends, with exit code 2 and the reason.
        complain: Shows the reason, where the process ends without returning from here: others may hang, and JAX would
            wait for them at its exit.

    Raises:
        UserError: Process 0 cannot be reached, or the run directory cannot be written.
    """
    address, number, index = (os.environ.get(name) for name in ENVIRONMENT)
    process, count = int(index or 0), int(number or 1)
    meeting = address or ""
    watch = Watch(run_dir, process=process, count=count, meeting=meeting, timeout_s=timeout_s, complain=complain)
    clock = _Clock()
    try:
        if count > 1 and os.environ.get("JAX_PLATFORMS") == "cpu":
            own_address()
        if address and process:
            watch.enter("reaching process 0")
            reach(address, timeout_s)
    except UserError as error:
        watch.fail(str(error))
        raise
    watch.enter("joining the other processes")
    start_process()
    clock.stop("joining")
    try:
        examination = _examine(run_dir, watch, Channel(process=process, count=count, timeout_s=2 * timeout_s), clock)
    except (RuntimeError, OSError) as error:
        message = f"process {process} on host {socket.gethostname()}: {watch.stage}: {_first_line(error)}"
        if count == 1:
            watch.fail(message)
            raise UserError(message) from error
        watch.leave(message)
        raise
    watch.end()
    return examination


def _examine(run_dir: Path | None, watch: Watch, channel: Channel, clock: _Clock) -> Examination:
    watch.enter("finding its devices")
    own = _look(run_dir)
    watch.enter("comparing clocks and folders")
    channel.wait()
    own["time"] = time.time()
    own["blind"] = None if run_dir is None else _see(run_dir, channel)
    rows = channel.gather(own)
    reports: list[Report] = []
    findings: list[Finding] = []
    plan: dict[str, Any] = {}
    if rows is not None:
        names = _name_hosts(rows)
        begin = rows[0]["time"]
        for row, name in zip(rows, names):
            report = {key: value for key, value in row.items() if key not in ("time", "identity")}
            reports.append(Report(**{**report, "host": name, "skew_s": row["time"] - begin}))
        findings = judging.judge_before(reports)
        plan = {"hosts": names, "measure": judging.can_measure(reports, findings)}
    plan = channel.tell(plan)
    clock.stop("telling")
    links = Links()
    if plan["measure"]:
        rates, links = _measure(plan["hosts"], watch, channel, clock)
        reports = [dataclasses.replace(report, rates=each) for report, each in zip(reports, rates)]
    if rows is not None:
        findings += judging.judge_after(reports, links)
    watch.enter("hearing the verdict")
    ok = bool(channel.tell(not any(finding.is_fault for finding in findings)))
    channel.wait()
    return Examination(ok=ok, reports=reports, links=links, findings=findings, seconds=clock.seconds)


def _look(run_dir: Path | None) -> dict[str, Any]:
    """A report of this process, without what is measured, as JSON."""
    import jax

    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    versions = {name: machine.find_version(name) for name in ("jax", "jaxlib", "mtx", *_PLUGINS)}
    plugins = [f"{name} {versions[name]}" for name in _PLUGINS if versions[name]]
    facts = {
        "devices": f"{len(devices)} x {', '.join(kinds)}",
        "python": platform.python_version(),
        **{name: versions[name] or "none" for name in ("jax", "jaxlib", "mtx")},
        "XLA_FLAGS": digest(flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_PATHS)),
        "NCCL variables": digest(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NCCL_")),
    }
    if plugins:
        facts["CUDA plugin"] = ", ".join(plugins)
    if (driver := machine.find_driver()) is not None:
        facts["driver"] = driver
    shared = Path("/dev/shm")
    usage = shutil.disk_usage(shared) if shared.is_dir() else None
    return {
        "process": jax.process_index(),
        "host": socket.gethostname(),
        "identity": _identity(),
        "platform": devices[0].platform,
        "facts": facts,
        "proxies": find_proxies(os.environ),
        "loopback": _own_loopback(),
        "free_disk": None if run_dir is None else shutil.disk_usage(run_dir).free,
        "shared_memory": usage.total if usage else None,
        "free_shared_memory": usage.free if usage else None,
        "free_memory": _available_memory(),
    }


def _see(run_dir: Path, channel: Channel) -> str | None:
    """Why this process does not see the files of process 0, or process 0 not its own; None: they see each other."""
    import jax

    process = jax.process_index()
    folder = run_dir / FOLDER
    token = channel.tell(os.urandom(8).hex())
    own = folder / f"token-{process}"
    own.write_text(token, encoding="utf-8")
    channel.wait()
    deadline, seen = time.monotonic() + _SEE_S, False
    while not seen:
        os.listdir(folder)  # makes a client of NFS ask again
        try:
            seen = (folder / "token-0").read_text(encoding="utf-8") == token
        except OSError:
            seen = False
        if time.monotonic() > deadline:
            break
        if not seen:
            time.sleep(0.2)
    missing = None
    if process == 0:
        missing = _find_missing(folder, token, jax.process_count())
    missing = channel.tell(missing)
    channel.wait()  # all have looked
    own.unlink()
    if not seen:
        return f"{run_dir} is not the folder that process 0 sees there"
    return f"what is written to {run_dir} there is not seen by process 0" if process in missing else None


def _find_missing(folder: Path, token: str, count: int) -> list[int]:
    deadline, missing = time.monotonic() + _SEE_S, list(range(count))
    while True:
        names = set(os.listdir(folder))
        missing = [p for p in missing if f"token-{p}" not in names or _read(folder / f"token-{p}") != token]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def _measure(
    hosts: Sequence[str], watch: Watch, channel: Channel, clock: _Clock
) -> tuple[list[list[dict[str, float]]], Links]:
    """Rates of all devices and links; on process 0 only, elsewhere none.

    Args:
        hosts: Of each process.
    """
    import jax

    from mtx.health import cluster_speed

    watch.enter("measuring its devices")
    rates = _gather(cluster_speed.measure_devices(), watch, channel)
    clock.stop("devices")
    own, distinct = hosts[jax.process_index()], list(dict.fromkeys(hosts))
    members = {name: [process for process, host in enumerate(hosts) if host == name] for name in distinct}
    watch.enter("all-reduce within each host")
    within = _gather(cluster_speed.measure_sum(members[own]), watch, channel)
    clock.stop("within hosts")
    between: list[tuple[str, str, float]] = []
    for number, pairs in enumerate(cluster_speed.plan_pairs(len(distinct)), 1):
        named = [(distinct[first], distinct[second]) for first, second in pairs]
        mine = next((pair for pair in named if own in pair), None)
        watch.enter(f"all-reduce between neighbours, round {number}" + (f", {mine[0]} and {mine[1]}" if mine else ""))
        value = cluster_speed.measure_sum(members[mine[0]] + members[mine[1]]) if mine else None
        values = _gather(value, watch, channel)
        if values:
            between += [(first, second, float(values[members[first][0]])) for first, second in named]
        clock.stop("between hosts")
    first = {name: within[members[name][0]] for name in distinct} if within else {}
    return rates, Links(within={name: value for name, value in first.items() if value is not None}, between=between)


def _gather(value: Any, watch: Watch, channel: Channel) -> list[Any]:
    """The values of all processes, on process 0; elsewhere none."""
    watch.enter(WAITING)
    return channel.gather(value) or []


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.monotonic()

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._begin, 2)
        self._begin = now


def digest(parts: Any) -> str:
    """The first 8 digits of a hash of words in any order; 'none' of no words."""
    words = sorted(parts)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8] if words else "none"


def _identity() -> str:
    """What NCCL tells hosts apart by: the host name and the boot (nccl, src/misc/utils.cc, getHostHash)."""
    return f"{socket.gethostname()} {_read(Path('/proc/sys/kernel/random/boot_id'))}"


def _name_hosts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The host name of each process, with a number where two hosts have the same."""
    known: dict[str, list[str]] = {}
    names = []
    for row in rows:
        same = known.setdefault(row["host"], [])
        if row["identity"] not in same:
            same.append(row["identity"])
        place = same.index(row["identity"])
        names.append(row["host"] if place == 0 else f"{row['host']}#{place + 1}")
    return names


def _own_loopback() -> str | None:
    try:
        address = own_address()
    except UserError:  # of no matter to GPUs; on CPU devices it has been reported before
        return None
    return address if address.startswith("127.") or address == "::1" else None


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
