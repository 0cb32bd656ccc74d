"""Real ssh servers on two loopback addresses, with keys and configuration of their own: hosts h1 and h2."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import free_port

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

SERVER = """
Port {port}
ListenAddress {address}
HostKey "{folder}/host_key"
PidFile "{folder}/sshd.{name}.pid"
AuthorizedKeysFile "{folder}/authorized_keys"
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 50
"""
CLIENT = """
Host {name}
    HostName {address}
    Port {port}
    HostKeyAlias {name}
"""
COMMON = """
Host *
    IdentityFile "{folder}/user_key"
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{folder}/known_hosts"
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    LogLevel ERROR
"""


@dataclass(frozen=True)
class Servers:
    """ssh servers that run."""

    folder: Path
    names: tuple[str, ...]

    @property
    def config(self) -> Path:
        """For `ssh -F`."""
        return self.folder / "ssh_config"


def unavailable(reason: str) -> None:
    """Skips the test, or fails it where the services must be there."""
    if os.environ.get("MTX_TEST_SERVICES") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def serve(folder: Path, hosts: dict[str, str], inside: dict[str, Sequence[str]] | None = None) -> Iterator[Servers]:
    """Runs a server for each host.

    Args:
        folder: New; may be private.
        hosts: Name and address of each.
        inside: Words before the server's command of each, which bring it to where it is to run.
    """
    if not Path(SSHD).exists() or shutil.which("ssh") is None:
        unavailable("OpenSSH is not installed")
    if os.geteuid() != 0:
        unavailable("the ssh servers of the tests run as root")
    folder.mkdir()
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    public, port = (folder / "host_key.pub").read_text(), free_port()
    (folder / "known_hosts").write_text("".join(f"{name} {public}" for name in hosts))
    entries = [CLIENT.format(name=name, address=address, port=port) for name, address in hosts.items()]
    (folder / "ssh_config").write_text("".join(entries) + COMMON.format(folder=folder))
    servers = []
    try:
        for name, address in hosts.items():
            text = SERVER.format(folder=folder, name=name, address=address, port=port)
            (folder / f"sshd.{name}.conf").write_text(text)
            command = [SSHD, "-D", "-f", str(folder / f"sshd.{name}.conf"), "-E", str(folder / f"sshd.{name}.log")]
            before = list((inside or {}).get(name, ()))
            servers.append(subprocess.Popen([*before, *command], stdin=subprocess.DEVNULL))
        yield _wait(folder, hosts)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=20)


def _wait(folder: Path, hosts: dict[str, str]) -> Servers:
    """Until every server has written its pid: it listens then."""
    deadline = time.monotonic() + 20
    while not all((folder / f"sshd.{name}.pid").exists() for name in hosts):
        if time.monotonic() > deadline:
            logs = "".join(path.read_text() for path in folder.glob("sshd.*.log"))
            unavailable(f"sshd does not start: {logs}")
        time.sleep(0.05)
    return Servers(folder, tuple(hosts))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two hosts, h1 and h2."""
    folder = tmp_path_factory.mktemp("servers") / "ssh"
    with serve(folder, {"h1": "127.0.0.1", "h2": "127.0.0.2"}) as running:
        yield running
