"""What this machine has for a run, and what is wrong with it.

Decides which findings are faults: what stops or cripples a run here. It changes nothing but the folder of the
compilation cache, which a run would make too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DRIVERS = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
"""First NVIDIA driver that runs programs of the CUDA version (CUDA Toolkit release notes, table 3)."""
_MIN_FREE_DISK_BYTES = 2 * 10**9
_MIN_SHARED_MEMORY_BYTES = 10**9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; `fault` and `cure` are None where it is as it should be."""

    name: str
    value: str
    fault: str | None = None
    cure: str | None = None


def examine_machine(folder: Path) -> list[Finding]:
    """Looks at Python, libraries, devices, memory and disk.

    Args:
        folder: Where runs would be written.
    """
    return [
        Finding(name="python", value=f"{platform.python_version()} on {platform.platform()}"),
        *_examine_packages(),
        *_examine_devices(),
        *_examine_host(folder),
    ]


def _examine_packages() -> Iterator[Finding]:
    """Every library that the package asks for, against the range it asks for."""
    for requirement in importlib.metadata.requires("mtx") or []:
        match = re.fullmatch(r"([\w.-]+)((?:[<>=]=?[\d.]+,?)*)", re.sub(r"\s", "", requirement))
        if match is None:
            continue  # belongs to an extra
        name, allowed = match.groups()
        version, cure = find_version(name), f"pip install '{match[0]}'"
        if version is None:
            yield Finding(name=name, value="missing", fault="not installed", cure=cure)
        elif not _is_within(version, allowed):
            yield Finding(name=name, value=version, fault=f"not within {allowed}", cure=cure)
        else:
            yield Finding(name=name, value=version)
    jax, jaxlib = find_version("jax"), find_version("jaxlib")
    if jax != jaxlib:
        fault, cure = f"not the version of jax, {jax}", f"pip install jax=={jax} jaxlib=={jax}"
        yield Finding(name="jaxlib", value=jaxlib or "missing", fault=fault, cure=cure)


def _examine_devices() -> Iterator[Finding]:
    driver = find_driver()
    plugins = {name: version for name in _DRIVERS if (version := find_version(name)) is not None}
    if driver is not None:
        yield Finding(name="nvidia driver", value=driver)
    for name, version in plugins.items():
        if driver is not None and int(driver.split(".")[0]) < _DRIVERS[name]:
            fault = f"{name} needs driver {_DRIVERS[name]} or newer"
            yield Finding(name=name, value=version, fault=fault, cure="update the NVIDIA driver of this host")
    try:
        from mtx.mesh import start_process

        start_process()
        import jax

        devices = jax.devices()
    except (RuntimeError, ImportError) as error:
        cure = "reinstall jax, jaxlib and its CUDA plugin in one version; `JAX_PLATFORMS=cpu` runs without a GPU"
        yield Finding(name="devices", value="none", fault=str(error).splitlines()[0], cure=cure)
        return
    kinds = sorted({device.device_kind for device in devices})
    found = f"{len(devices)} x {', '.join(kinds)}"
    if driver is not None and devices[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        fault = "this host has an NVIDIA GPU and JAX does not use it"
        cure = f"pip install 'jax[cuda13]=={jax.__version__}'"
        yield Finding(name="devices", value=found, fault=fault, cure=cure)
    else:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
        yield Finding(name="devices", value=f"{found}, {_gigabytes(limit)} usable each" if limit else found)
    cache = jax.config.values["jax_compilation_cache_dir"]
    if cache is None:
        yield Finding(name="compilation cache", value="off")
    else:
        yield _examine_folder("compilation cache", Path(cache), "set MTX_COMPILATION_CACHE to a folder that can be")


def _examine_host(folder: Path) -> Iterator[Finding]:
    yield Finding(name="cores", value=str(len(os.sched_getaffinity(0))))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    yield Finding(name="memory", value=f"{_gigabytes(total)}, {_gigabytes(free)} free")
    shared = Path("/dev/shm")
    if find_driver() is not None and shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < _MIN_SHARED_MEMORY_BYTES
        yield Finding(
            name="shared memory",
            value=_gigabytes(size),
            fault="too small for NCCL between the GPUs of a host" if small else None,
            cure="start the container with --shm-size=8g or --ipc=host" if small else None,
        )
    yield _examine_folder("disk", folder, "go to, or name with --run-dir, a folder that can be")


def _examine_folder(name: str, folder: Path, cure: str) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name=name, value=str(folder), fault=f"cannot be written: {error.strerror}", cure=cure)
    value = f"{folder}, {_gigabytes(free)} free"
    if free < _MIN_FREE_DISK_BYTES:
        return Finding(name=name, value=value, fault="hardly any room for a checkpoint", cure="free some disk")
    return Finding(name=name, value=value)


def find_version(package: str) -> str | None:
    """Version of an installed package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_within(version: str, allowed: str) -> bool:
    """Whether a version lies in a range like `>=0.10.2,<0.12`, compared by its leading numbers."""
    actual = _numbers(version)
    for bound in filter(None, allowed.split(",")):
        sign, limit = re.match(r"([<>=]+)(.*)", bound).groups()  # type: ignore[union-attr]
        difference = (actual > _numbers(limit)) - (actual < _numbers(limit))
        if difference not in {"<": (-1,), "<=": (-1, 0), "==": (0,), ">=": (0, 1), ">": (1,)}[sign]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def find_driver() -> str | None:
    """Version of the NVIDIA driver in the kernel; None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d{3,}\.\d[\d.]*)\s", path.read_text()) if path.exists() else None
    return match[1] if match else None


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
