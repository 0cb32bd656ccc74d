"""How long a start took: the parts add up, from before Python began."""

import subprocess
import sys
import time

import pytest

from mtx.health import startup
from mtx.health.startup import Startup


def test_parts_add_up_in_order():
    counted = Startup()
    begin = time.perf_counter()
    time.sleep(0.02)
    counted.end("a")
    counted.end("b")
    time.sleep(0.01)
    counted.end("a")
    assert list(counted.parts) == ["python", "a", "b"]
    assert counted.parts["a"] >= 0.03 > counted.parts["b"]
    assert counted.seconds == pytest.approx(sum(counted.parts.values()))
    assert counted.seconds - counted.parts["python"] == pytest.approx(time.perf_counter() - begin, abs=0.05)


def test_the_interpreter_is_counted():
    program = "import time; time.sleep(0.3); from mtx.health.startup import Startup; print(Startup().seconds)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.perf_counter() - begin + 0.02


def test_a_system_that_does_not_say_starts_at_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "Path", lambda _: tmp_path / "missing")
    assert Startup().seconds < 0.1
