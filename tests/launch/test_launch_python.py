"""Login nodes have old Pythons and nothing installed."""

import ast
import sys

import pytest
from programs import ROOT, run

SOURCES = sorted((ROOT / "launch").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_reads_as_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    used = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    used |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert used <= {*sys.stdlib_module_names, "launch"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))
    if path.name != "__init__.py":  # annotations as strings: `X | None` is no expression in 3.9
        assert "annotations" in {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}


def test_help_names_the_targets():
    done = run(["-m", "launch", "--help"])
    assert "local" in done.stdout
