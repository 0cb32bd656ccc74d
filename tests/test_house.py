"""The house rules, by reading sources: who may import what, one home for each library, no file too long to read."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from mtx.config.axes import MESH_AXES
from mtx.config.components import classes, components, settings

ROOT = pathlib.Path(__file__).parents[1]
MAX_LINES = 400

# Each room may import itself and those before it.
ROOMS = (
    "errors", "jsonl", "config", "mesh", "sharding", "collectives", "nn", "models", "objectives", "optim", "data",
    "training", "checkpoints", "health", "planning", "reports", "interop", "inference", "evaluation", "commands", "cli",
    "__main__",
)  # fmt: skip

# The story of a run brings everything together.
STORY = ("checkpoints", "health", "planning", "reports")
MORE_ROOMS = {f"mtx/training/{name}.py": STORY for name in ("run", "resume", "loop")}

# Besides the standard library and NumPy. The longest matching path decides.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "mtx/__init__.py": (),
    "mtx/__main__.py": (),
    "mtx/cli.py": (),
    "mtx/commands/": ("jax", "rich"),  # inside run() only: which process am I, how many devices are there
    "mtx/errors.py": (),
    "mtx/jsonl.py": (),
    "mtx/config/": (),
    "mtx/config/statements.py": ("gin",),
    "mtx/mesh.py": ("jax",),
    "mtx/sharding.py": ("jax",),
    "mtx/collectives.py": ("jax",),
    "mtx/nn/": ("jax",),
    "mtx/nn/param.py": ("flax", "jax"),
    "mtx/models/": ("jax",),
    "mtx/objectives/": ("jax",),
    "mtx/optim/": ("jax", "optax"),
    "mtx/data/": ("sentencepiece", "tensorstore", "tokenizers", "zstandard"),
    "mtx/training/": ("jax", "optax"),
    "mtx/training/schedule.py": (),
    "mtx/checkpoints/": ("jax", "orbax"),
    "mtx/health/": ("jax",),
    "mtx/planning/": (),
    "mtx/planning/rehearsal_child.py": ("jax",),
    "mtx/reports/": ("matplotlib", "rich", "tensorboardX"),
    "mtx/interop/": ("jax", "ml_dtypes", "safetensors"),  # what is read is placed on the mesh, shard by shard
    "mtx/inference/": ("jax",),
    "mtx/evaluation/": ("jax",),
    "launch/": (),
}
WITHOUT_NUMPY = ("mtx/config/", "mtx/errors.py", "mtx/jsonl.py", "mtx/cli.py", "launch/")

COLLECTIVES = {
    "all_gather", "all_to_all", "axis_index", "pcast", "pmax", "pmean", "pmin", "ppermute", "psum", "psum_scatter",
    "pvary",
}  # fmt: skip
BANNED_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve", "yaml"}
BANNED_CALLS = {"eval", "exec", "os.popen", "os.system"}

SOURCES = sorted(str(path.relative_to(ROOT)) for room in ("mtx", "launch") for path in (ROOT / room).rglob("*.py"))
FILES = [
    *SOURCES,
    *sorted(str(p.relative_to(ROOT)) for room in ("tests", "benchmarks") for p in (ROOT / room).rglob("*.py")),
]


def find_faults(path: str, source: str) -> list[str]:
    """What a source file does against the rules of its room."""
    tree = ast.parse(source)
    matching = [prefix for prefix in LIBRARIES if path.startswith(prefix)]
    if not matching:
        return [f"{path}: no room of the house; add it to the tables of this test"]
    libraries = set(LIBRARIES[max(matching, key=len)])
    if not path.startswith(WITHOUT_NUMPY):
        libraries.add("numpy")
    package = pathlib.PurePath(path).parts[0]
    faults = []
    for line, module in _imports(tree):
        top, _, rest = module.partition(".")
        if top in BANNED_MODULES:
            faults.append(f"{path}:{line}: {top} is never imported")
        elif top == package == "mtx":
            if rest and (room := rest.split(".")[0]) not in _rooms_of(path):
                faults.append(f"{path}:{line}: {room} stands above this room")
        elif top != package and top not in sys.stdlib_module_names and top not in libraries:
            faults.append(f"{path}:{line}: {top} has another home")
    faults += [f"{path}:{line}: {what}" for line, what in _calls_against_rules(path, tree)]
    return faults


def _rooms_of(path: str) -> set[str]:
    room = pathlib.PurePath(path).parts[1].removesuffix(".py")
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    return {*below, *MORE_ROOMS.get(path, ())}


def _imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("mtx", "jax"):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "relative"


def _calls_against_rules(path: str, tree: ast.AST):
    lax = {"jax.lax"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "jax":
            lax |= {alias.asname or alias.name for alias in node.names if alias.name == "lax"}
        if isinstance(node, ast.Import):
            lax |= {alias.asname for alias in node.names if alias.name == "jax.lax" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield node.lineno, f"{ast.unparse(node.func)} runs data as code"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and not _is_false(keyword.value):
                    yield node.lineno, f"{keyword.arg} runs data as code"
        if path == "mtx/collectives.py":
            continue
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES and ast.unparse(node.value) in lax:
            yield node.lineno, f"lax.{node.attr} belongs to mtx/collectives.py"
        if isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            for alias in node.names:
                if alias.name in COLLECTIVES:
                    yield node.lineno, f"lax.{alias.name} belongs to mtx/collectives.py"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_rules(path):
    assert find_faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", FILES)
def test_file_is_short(path):
    assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("mtx/config/schema.py", "import jax", "jax has another home"),
        ("mtx/config/reader.py", "def f():\n    import jax.numpy", "jax has another home"),
        ("mtx/config/reader.py", "import numpy", "numpy has another home"),
        ("mtx/nn/linear.py", "from flax import nnx", "flax has another home"),
        ("mtx/nn/linear.py", "from mtx.training.step import make_step", "training stands above"),
        ("mtx/nn/linear.py", "from mtx import data", "data stands above"),
        ("mtx/training/step.py", "import mtx.checkpoints.store", "checkpoints stands above"),
        ("mtx/training/step.py", "import orbax.checkpoint as ocp", "orbax has another home"),
        ("mtx/training/schedule.py", "import jax", "jax has another home"),
        ("mtx/health/journal.py", "import grain", "grain has another home"),
        ("launch/slurm.py", "import mtx.errors", "mtx has another home"),
        ("mtx/novelty.py", "import os", "no room"),
        ("mtx/nn/loss.py", "from jax import lax\nlax.psum(x, 'tensor')", "lax.psum belongs"),
        ("mtx/nn/loss.py", "import jax\njax.lax.all_gather(x, 'tensor')", "lax.all_gather belongs"),
        ("mtx/nn/loss.py", "from jax.lax import ppermute", "lax.ppermute belongs"),
        ("mtx/nn/loss.py", "import jax.lax as L\nL.pmax(x, 'tensor')", "lax.pmax belongs"),
        ("mtx/data/store.py", "import pickle", "never imported"),
        ("mtx/data/store.py", "from yaml import load", "never imported"),
        ("mtx/data/store.py", "x = eval(text)", "runs data as code"),
        ("mtx/data/store.py", "import subprocess\nsubprocess.run(command, shell=True)", "runs data as code"),
        ("mtx/data/store.py", "import numpy as np\nnp.load(path, allow_pickle=True)", "runs data as code"),
    ],
)
def test_the_checker_can_fail(path, source, fault):
    faults = find_faults(path, source)
    assert len(faults) == 1
    assert fault in faults[0]


def test_the_checker_lets_good_sources_pass():
    assert find_faults("mtx/training/loop.py", "from mtx.checkpoints.store import Checkpoints\nimport jax") == []
    assert find_faults("mtx/collectives.py", "from jax import lax\nlax.psum(x, 'tensor')") == []
    assert find_faults("mtx/nn/loss.py", "comm.psum(x, 'vocab')") == []


def test_rooms_exist():
    unknown = {re.split(r"[/.]", path)[1] for path in LIBRARIES if path.startswith("mtx/")} - {*ROOMS, "__init__"}
    assert not unknown


def test_light_rooms_start_no_heavy_library():
    program = (
        "import sys; import mtx.cli; from mtx.config import components, reader\n"
        "mtx.cli.find_commands(), components.components()\n"
        "print(*{'jax', 'numpy', 'optax', 'flax', 'orbax', 'tensorstore', 'grain', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_field_is_read():
    read = set()
    uses = ("mtx/config/schema.py", "mtx/config/rules.py")  # the others check fields, which is not using them
    for path in SOURCES:
        if path in uses or not path.startswith("mtx/config/"):
            tree = ast.parse((ROOT / path).read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    fields = {setting.key for cls in classes().values() for setting in settings(cls).values()}
    assert {key for key in fields if key.split(".")[1] not in read and not key.startswith("Mesh.")} == set()


def test_mesh_fields_are_the_mesh_axes():
    """Mesh fields are read by name from this list, which the test above cannot see."""
    assert tuple(settings(classes()["Mesh"])) == MESH_AXES


def test_components_are_found():
    assert {"AdamW", "Causal", "WarmupCosine", "RopeScaling", "BatchRamp"} <= set(components())
