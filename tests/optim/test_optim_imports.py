"""The config layer imports these rooms to find their dataclasses, and must stay light."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
for room in ("mtx.optim", "mtx.objectives"):
    package = importlib.import_module(room)
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{room}.{info.name}")
heavy = {"jax", "optax", "numpy", "flax"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_optimizers_and_objectives_import_no_jax():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
