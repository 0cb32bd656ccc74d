"""How a process is started."""

import os

import pytest

from mtx import mesh

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.mark.parametrize("chosen", [None, *NAMES])
def test_the_pool_takes_the_card_unless_the_user_says_otherwise(monkeypatch, chosen):
    for name in NAMES:
        monkeypatch.setenv(name, "0.5")  # so that it is put back
        if name != chosen:
            monkeypatch.delenv(name)
    monkeypatch.setenv("MTX_COMPILATION_CACHE", "")
    mesh.start_process()
    wanted = {NAMES[0]: str(mesh.POOL_SHARE)} if chosen is None else {chosen: "0.5"}
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == wanted
