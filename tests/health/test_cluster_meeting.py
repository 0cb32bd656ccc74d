"""How processes wait for each other before a run, and how they find out what is shared."""

from __future__ import annotations

import itertools
import socket
import threading

import pytest
from programs import free_port

from mtx.errors import UserError
from mtx.health import cluster_meeting as meeting
from mtx.health.cluster import digest
from mtx.health.cluster_speed import plan_pairs


@pytest.mark.parametrize(
    ("address", "parts"),
    [("h1:80", ("h1", 80)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[fd00::1]:8476", ("fd00::1", 8476))],
)
def test_addresses(address, parts):
    assert meeting.split_address(address) == parts


@pytest.mark.parametrize("address", ["h1", "h1:", ":80", "h1:port", "fd00::1:80"])
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="HOST:PORT"):
        meeting.split_address(address)


def test_process_0_may_come_late():
    port = free_port()
    late = socket.socket()
    late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    timer = threading.Timer(1.0, lambda: (late.bind(("127.0.0.1", port)), late.listen()))
    timer.start()
    try:
        meeting.reach(f"127.0.0.1:{port}", timeout_s=20)
        assert not timer.is_alive()
    finally:
        timer.join()
        late.close()


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"cannot reach process 0 at {address}: Connection refused.*https_proxy"):
        meeting.reach(address, timeout_s=0.1)


def test_a_name_that_does_not_resolve(monkeypatch):
    def fail(*arguments, **named):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match=r"the name does not resolve \(Name or service not known"):
        meeting.reach("h1:80", timeout_s=0.1)
    with pytest.raises(UserError, match="its own name does not resolve"):
        meeting.own_address()


def test_proxies():
    assert meeting.find_proxies({"HTTPS_PROXY": "p", "http_proxy": "", "PATH": "p"}) == ["HTTPS_PROXY"]
    assert meeting.find_proxies({"HTTPS_PROXY": "p", "no_proxy": "*"}) == []


def test_who_is_late():
    notes = {process: {"host": f"h{process}", "stage": "devices"} for process in range(300)}
    del notes[7]
    assert "1 of 300 processes have not begun, or see another run directory: 7;" in meeting.describe_late(notes, 300)
    notes[7] = {"host": "h7", "stage": "joining"}
    text = meeting.describe_late(notes, 300)
    assert text.startswith("at 'joining': process 7 on h7; at 'devices': process 0 on h0")
    assert text.endswith("and 291 more")
    assert "--run-dir" in meeting.describe_late({}, 300)


@pytest.mark.parametrize("count", range(1, 12))
def test_pairs(count):
    rounds = plan_pairs(count)
    for pairs in rounds:
        hosts = list(itertools.chain(*pairs))
        assert len(hosts) == len(set(hosts))
    found = sorted(tuple(sorted(pair)) for pair in itertools.chain(*rounds))
    ring = {tuple(sorted((host, (host + 1) % count))) for host in range(count)} if count > 1 else set()
    assert found == sorted(ring)
    assert len(rounds) <= (1 if count == 2 else 3 if count % 2 else 2)


def test_order_of_flags_does_not_matter():
    assert digest(["--a=1", "--b=2"]) == digest(["--b=2", "--a=1"]) != digest(["--a=1"])
    assert digest([]) == "none"


def test_a_process_that_failed_before_does_not_stop_the_next_attempt(tmp_path):
    """Where the coordinator's address is the same in all attempts, as in Kubernetes."""

    def watch(process, messages):
        return meeting.Watch(tmp_path, process=process, count=2, meeting="h0:1", timeout_s=60, complain=messages.append)

    watch(1, []).fail("broken")
    first = watch(0, [])
    try:
        assert first.notes()[1]["failure"] == "broken"
        assert [first._look_at_others(looks) for looks in (4, 8)] == [None, None]
        watch(1, []).fail("broken again")
        assert first._look_at_others(12) == "broken again"
    finally:
        first.end()
