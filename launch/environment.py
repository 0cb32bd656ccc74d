"""Chooses the environment of the processes of a job, by GPU, version of jaxlib and profile; says where each is from.

`python -m launch.environment` prints the tables. What the user sets, with `--env` or in the shell, always wins, and
what it replaces is shown. Processes on CPU devices get nothing but what the user gives.

Invariant: an XLA flag is chosen only for a jaxlib that is known to know it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import flags, nccl
from launch.job import LaunchError

XLA_FLAGS, CACHE = "XLA_FLAGS", "MTX_COMPILATION_CACHE"
OURS = ("MTX_COORDINATOR", "MTX_NUM_PROCESSES", "MTX_PROCESS_ID", "CUDA_VISIBLE_DEVICES")
"""What the launcher gives each process itself."""
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy, in this order (https://grpc.github.io/grpc/core/md_doc_core_default_http_proxy_mapper.html)"""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_ILLEGAL = re.compile(r"(?:Illegal value for --|Couldn't interpret value .*? for flag )(\w+)")
_VERSION = "import importlib.metadata as m; print(m.version('jaxlib'))"
_TRIAL = "import jax; jax.devices()"
_TRIAL_S = 120.0


@dataclass(frozen=True)
class Setting:
    """A variable of every process.

    Attributes:
        origins: Lines on where the value, or each part of it, is from.
    """

    name: str
    value: str
    origins: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """What was chosen.

    Attributes:
        notes: Lines on what was decided, and what could not be.
        python: The interpreter in which the flags can be tried; None: there is none here, or nothing to try.
    """

    settings: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()
    python: str | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The variables, as a job has them."""
        return tuple((setting.name, setting.value) for setting in self.settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To the parser of a target."""
    add = parser.add_argument
    text = "for which settings are chosen, such as h100 or b200; default: what this machine has, else no settings"
    add("--gpu", metavar="NAME", help=text)
    text = "what they aim at: %(choices)s; default: %(default)s"
    add("--profile", choices=flags.PROFILES, default=flags.PROFILES[0], help=text)
    text = "version that the processes have; default: that of the command's own Python environment, where it is here"
    add("--jaxlib", metavar="VERSION", help=text)
    text = "a variable of every process, which wins over what is chosen; without a value: the one it has here"
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help=text)
    text = "folder of compiled programs, shared by all hosts; default: ~/.cache/mtx/xla of each"
    add("--compilation-cache", metavar="DIR", help=text)


def choose(
    *,
    profile: str = flags.PROFILES[0],
    gpu: str | None = None,
    jaxlib: str | None = None,
    python: str | None = None,
    given: Sequence[str] = (),
    cache: str | None = None,
    simulated: bool = False,
    inherited: Mapping[str, str] | None = None,
    root: Path = Path("/"),
) -> Environment:
    """Chooses.

    Args:
        profile: One of `flags.PROFILES`.
        gpu: Name of the GPUs; None: those of this machine.
        jaxlib: Its version in the processes; None: `python` is asked.
        python: Interpreter of the processes; None: it is not here.
        given: `NAME=VALUE`, or `NAME` for the value it has here.
        cache: Folder of compiled programs.
        simulated: The processes compute on CPU devices.
        inherited: The environment of this process, by default.
        root: Of /proc.

    Raises:
        LaunchError: A name or value cannot be used.
    """
    inherited = os.environ if inherited is None else inherited
    users = dict(_split(word, inherited) for word in given)
    if cache is not None:
        if CACHE in users:
            raise LaunchError(f"--compilation-cache and --env {CACHE} say the same: give one of them")
        _refuse_nul("--compilation-cache", cache)
        users[CACHE] = cache if "://" in cache else os.path.abspath(os.path.expanduser(cache))
    simulated = simulated or users.get("JAX_PLATFORMS", inherited.get("JAX_PLATFORMS")) == "cpu"
    generation, notes = (None, ["CPU devices: no GPU settings"]) if simulated else _find_generation(gpu, root)
    settings, ours = [], []
    if generation is not None:
        notes.append(f"profile {profile}, generation {generation}")
        for variable, value in nccl.chosen(profile, generation):
            if variable.name in users:
                notes.append(f"{variable.name}: yours, in place of {value}")
            elif variable.name in inherited:
                notes.append(f"{variable.name}: yours, in place of {value}")
                users[variable.name] = inherited[variable.name]
            else:
                settings.append(Setting(variable.name, value, (f"{variable.meaning} ({variable.source})",)))
        version = jaxlib or ask_version(python)
        ours = _choose_flags(profile, generation, version, python, notes)
    if ours or XLA_FLAGS in users:
        settings.append(_compose(ours, inherited.get(XLA_FLAGS, ""), users.pop(XLA_FLAGS, ""), notes))
    elif inherited.get(XLA_FLAGS):
        notes.append("XLA_FLAGS of this shell: kept as it is, but in containers only with `--env XLA_FLAGS`")
    settings += [Setting(name, value, ("yours",)) for name, value in users.items()]
    tries = not simulated and any(setting.name == XLA_FLAGS for setting in settings)
    return Environment(tuple(settings), tuple(notes), python if tries else None)


def describe(environment: Environment) -> list[str]:
    """Every setting with its source, and what was decided, a line each. Values of the user are not shown, but flags."""
    lines = list(environment.notes)
    for setting in environment.settings:
        if len(setting.origins) == 1 and setting.name != XLA_FLAGS:
            shown = setting.name if setting.origins == ("yours",) else f"{setting.name}={setting.value}"
            lines.append(f"{shown}: {setting.origins[0]}")
        else:
            lines += [f"{setting.name}:", *(f"  {origin}" for origin in setting.origins)]
    return ["# " + line.encode("unicode_escape").decode("ascii") for line in lines]


def with_notes(environment: Environment, rendered: str) -> str:
    """A rendered job with `describe` before it; below the first line of a script, which must stay the first."""
    first, _, rest = rendered.partition("\n")
    head = [first] if first.startswith("#!") else []
    return "\n".join([*head, *describe(environment), rest if head else rendered])


def check(environment: Environment) -> str | None:
    """Tries the XLA flags in a process that ends at once: elsewhere an unknown one costs the time in the queue.

    Returns:
        Why they could not be tried; None: they were, or there are none.

    Raises:
        LaunchError: One is unknown, or has a value that it does not take.
    """
    text = dict(environment.pairs).get(XLA_FLAGS, "")
    if not text:
        return None
    if environment.python is None:
        return "XLA_FLAGS were not tried: the processes' Python environment is not on this machine, or they use CPUs"
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", XLA_FLAGS: text}
    try:
        done = subprocess.run(
            [environment.python, "-c", _TRIAL],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TRIAL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"XLA_FLAGS were not tried: {error}"
    said = done.stderr.decode("utf-8", "replace")
    if done.returncode == 0:
        return None
    unknown = _UNKNOWN.search(said)
    if unknown is not None:
        names = re.findall(r"--(\w+)", unknown[1])
        raise LaunchError(
            "XLA_FLAGS: this jaxlib does not know " + "; ".join(map(_advice, names)) + "; it would end every process"
        )
    if "Flag parsing failed" in said:
        names = sorted(set(_ILLEGAL.findall(said)))
        raise LaunchError(f"XLA_FLAGS: {', '.join(names) or 'a flag'} does not take this value: {text}")
    return f"XLA_FLAGS were not tried: {environment.python}: {(said.strip().splitlines() or ['it failed'])[-1]}"


def ask_version(python: str | None) -> str | None:
    """The version of jaxlib that an interpreter has; None: it has none, or cannot be started."""
    if python is None:
        return None
    try:
        done = subprocess.run([python, "-c", _VERSION], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("ascii", "replace").strip() or None if done.returncode == 0 else None


def past_proxy(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """What lets processes meet at HOST:PORT although the environment has a proxy; nothing where it has none.

    gRPC would ask the proxy for that host, and wait. Its own exception list is extended; downloads keep the proxy.
    """
    host = address.rpartition(":")[0].strip("[]")
    if not host or not any(environment.get(name) for name in PROXIES):
        return {}
    kept = environment.get("no_grpc_proxy") or environment.get("no_proxy")
    return {"no_grpc_proxy": f"{kept},{host}" if kept else host}


def find_program_python(program: str) -> str | None:
    """The interpreter that a program of a Python environment runs in; None: it cannot be told."""
    found = shutil.which(program)
    if found is None:
        return None
    if re.fullmatch(r"python[0-9.]*", Path(found).name):
        return found
    beside = [Path(found).parent / "python", Path(found).resolve().parent / "python"]
    return next((str(path) for path in beside if path.exists()), None)


def tables() -> str:
    """The tables, as the documentation has them."""
    rows = ["| flag | value by profile | jaxlib | what it does |", "|---|---|---|---|"]
    for flag in flags.FLAGS:
        versions = " ".join([f"from {flag.first}"] * bool(flag.first) + [f"up to {flag.last}"] * bool(flag.last))
        meaning = f"{flag.meaning} ([source]({flag.source}))"
        rows.append(f"| `{flag.name}` | {_uses(flag.uses)} | {versions or 'all'} | {meaning} |")
    rows += ["", "| flag that no jaxlib knows any more | instead |", "|---|---|"]
    rows += [f"| `{name}` | {advice} |" for name, advice in flags.GONE.items()]
    rows += ["", "| variable | unit | value by profile | what it does |", "|---|---|---|---|"]
    rows += [
        f"| `{v.name}` | {v.unit} | {_uses(v.uses)} | {v.meaning} ([source]({v.source})) |" for v in nccl.VARIABLES
    ]
    rows += ["", "| generation | GPUs |", "|---|---|"]
    rows += [f"| {generation} | {' '.join(names)} |" for generation, names in flags.GPUS.items()]
    return "\n".join(rows)


def _uses(uses: Sequence[flags.Use]) -> str:
    words = []
    for use in uses:
        where = "" if use.generations == flags.GENERATIONS else f" on {', '.join(use.generations)}"
        words.append(f"{', '.join(use.profiles)}: {f'`{use.value}`' if use.value else 'empty'}{where}")
    return "; ".join(words) or "yours"


def _split(word: str, inherited: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not _NAME.fullmatch(name):
        raise LaunchError(f"--env {word!r}: NAME=VALUE or NAME, of letters, digits and '_', not a digit first")
    if name in OURS:
        raise LaunchError(f"--env {name}: the launcher gives each process its own; CUDA_VISIBLE_DEVICES: export it")
    if not equals:
        if name not in inherited:
            raise LaunchError(f"--env {name}: it is not set here; set it, or give {name}=VALUE")
        value = inherited[name]
    _refuse_nul(f"--env {name}", value)
    return name, value


def _refuse_nul(what: str, value: str) -> None:
    if "\0" in value:
        raise LaunchError(f"{what}: no value of a variable has a NUL character")


def _find_generation(gpu: str | None, root: Path) -> tuple[str | None, list[str]]:
    if gpu is not None:
        generation = flags.generation_of(gpu)
        if generation is None:
            names = ", ".join(name for names in flags.GPUS.values() for name in names)
            raise LaunchError(f"--gpu {gpu}: one of {names}; without the option this machine's is taken")
        return generation, []
    models = set()
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        models |= set(re.findall(r"^Model:\s*(.*?)\s*$", path.read_text(errors="replace"), re.MULTILINE))
    found = {flags.generation_of(model) for model in models}
    if not models:
        return None, ["no GPU on this machine, and no --gpu: no GPU settings"]
    if len(found) > 1 or None in found:
        return None, [f"{', '.join(sorted(models))}: not one generation of the table: no GPU settings without --gpu"]
    return found.pop(), [f"GPUs of this machine: {', '.join(sorted(models))}"]


def _choose_flags(
    profile: str, generation: str, version: str | None, python: str | None, notes: list[str]
) -> list[tuple[flags.Flag, str]]:
    if version is None:
        where = f"{python} has none" if python is not None else "its Python environment is not here"
        notes.append(f"jaxlib: {where}, and no --jaxlib: no XLA flags are chosen")
        return []
    if not flags.numbers(version):
        raise LaunchError(f"--jaxlib {version}: a version, such as {flags.TRIED[-1]}")
    if flags.numbers(version) < flags.numbers(flags.TRIED[0]):
        notes.append(f"jaxlib {version} is older than {flags.TRIED[0]}: no XLA flags are chosen")
        return []
    untried = version not in flags.TRIED
    notes.append(f"jaxlib {version}" + (f" (flags were tried with {', '.join(flags.TRIED)})" if untried else ""))
    return flags.chosen(profile, generation, version)


def _compose(ours: Sequence[tuple[flags.Flag, str]], inherited: str, given: str, notes: list[str]) -> Setting:
    """One XLA_FLAGS: what is chosen, then the shell's, then what `--env` gives, since the last one of a name wins."""
    words = [*inherited.split(), *(given.split() if given.split() != inherited.split() else ())]
    theirs = {word.lstrip("-").partition("=")[0] for word in words}
    parts, origins = [], []
    for flag, value in ours:
        if flag.name in theirs:
            notes.append(f"--{flag.name}: yours, in place of {value!r}")
            continue
        parts.append(f"--{flag.name}={value}")
        origins.append(f"{parts[-1]}: {flag.meaning} ({flag.source})")
    return Setting(XLA_FLAGS, " ".join([*parts, *words]), (*origins, *(f"{word}: yours" for word in words)))


def _advice(name: str) -> str:
    if name in flags.GONE:
        return f"--{name} (gone; instead: {flags.GONE[name]})"
    near = difflib.get_close_matches(name, [flag.name for flag in flags.FLAGS if flag.name != name], 3)
    return f"--{name}" + (f" (near: {', '.join(near)})" if near else "")


if __name__ == "__main__":
    print(tables())
    sys.exit(0)
