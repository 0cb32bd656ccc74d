"""Hosts on a network of their own: each with its own network, host name and /etc/hosts, all with this machine's files.

A host is a network namespace; what runs there is in a UTS and a mount namespace besides. Nothing outside changes.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssh_hosts import Servers, serve, unavailable

ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
USER = "user"
"""Name of the host that stands for the user's machine."""
_NUMBERS = itertools.count()
"""Of the networks of this process, of which several can be there at a time."""
IPV4, IPV6 = "10.77.0.", "fd77::"
"""How the addresses begin. The names lead to those of version 4."""


@dataclass(frozen=True)
class Network:
    """Hosts h1, h2, ... and the user's machine, on one switch.

    Attributes:
        prefix: Of the names of the namespaces.
        hosts_file: The /etc/hosts of all of them.
        names: Of the hosts, without the user's machine.
    """

    prefix: str
    hosts_file: Path
    names: tuple[str, ...]

    def addresses(self, start: str = IPV4) -> dict[str, str]:
        return {name: f"{start}{number}" for number, name in enumerate(self.names, 1)}

    def inside(self, name: str) -> list[str]:
        """Words that come before a command to run on a host."""
        enter = ["nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--uts", "--mount"]
        return [*enter, "--propagation", "private", "bash", "-c", ENTER, "_", name, str(self.hosts_file)]

    def set_link(self, name: str, state: str) -> None:
        """Cuts the link of a host (`down`), or mends it (`up`)."""
        _ip("-n", f"{self.prefix}switch", "link", "set", f"to-{name}", state)


@contextmanager
def make_network(folder: Path, count: int) -> Iterator[Network]:
    """A network of `count` hosts and the user's machine; it is gone afterwards, with all that runs on it.

    Args:
        folder: For the /etc/hosts of the hosts.
    """
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        unavailable("network namespaces need Linux, root and iproute2")
    network = Network(
        f"mtx{os.getpid()}-{next(_NUMBERS)}-", folder / "hosts", tuple(f"h{number}" for number in range(1, count + 1))
    )
    everyone = [*network.names, USER]
    addresses = {**network.addresses(), USER: f"{IPV4}254"}
    entries = [f"{address} {name}" for name, address in addresses.items()]
    network.hosts_file.write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))
    switch = f"{network.prefix}switch"
    with ExitStack() as stack:
        for name in (switch, *(network.prefix + name for name in everyone)):
            added = _ip("netns", "add", name, check=False)
            if added.returncode:
                unavailable(f"network namespaces cannot be made: {added.stderr}")
            stack.callback(_remove, name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name in everyone:
            own, port = network.prefix + name, f"to-{name}"
            _ip("link", "add", "e0", "netns", own, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", own, "addr", "add", f"{addresses[name]}/24", "dev", "e0")
            _ip("-n", own, "addr", "add", f"{IPV6}{addresses[name].rpartition('.')[2]}/64", "dev", "e0", "nodad")
            _ip("-n", own, "link", "set", "e0", "up")
        yield network


@contextmanager
def make_ssh_network(folder: Path, count: int, start: str = IPV4) -> Iterator[tuple[Network, Servers]]:
    """The same, with an ssh server on every host.

    Args:
        folder: Exists.
        start: Of the addresses that the servers listen at.
    """
    with make_network(folder, count) as network:
        inside = {name: network.inside(name) for name in network.names}
        with serve(folder / "ssh", network.addresses(start), inside) as servers:
            yield network, servers


def _remove(name: str) -> None:
    """Ends what runs in a namespace, by its process ids, and removes it."""
    deadline = time.monotonic() + 10
    while pids := _ip("netns", "pids", name).stdout.split():
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert time.monotonic() < deadline, f"{name}: {pids} do not end"
        time.sleep(0.1)
    _ip("netns", "del", name)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
