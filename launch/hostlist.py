"""Names of hosts from the short form that Slurm and people write them in. Pure.

    gpu[01-03,7],login1     gpu01 gpu02 gpu03 gpu7 login1
    rack[1-2]n[1-2]         rack1n1 rack1n2 rack2n1 rack2n2
    gpu-[3,7]-ib            gpu-3-ib gpu-7-ib
    fe80::1,[::1]           fe80::1 ::1

The grammar is that of `scontrol show hostnames` (Slurm, src/common/hostlist.c): any number of brackets anywhere in a
name, each with numbers and ranges; the first number of a range says how many digits there are. Brackets round what has
a colon are those of an IPv6 address.

Invariant: what is not understood is refused; a name never comes out with a bracket in it.
"""

from __future__ import annotations

import itertools
import re

from launch.job import LaunchError

MOST = 100_000
"""Hosts of one list: a mistyped range shall not fill the memory."""

_PART = re.compile(r"([^\[\]]*)(?:\[([^\[\]]*)\])?")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_IPV6 = re.compile(r"\[([^\[\],]*:[^\[\],]*)\]")
_NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%@-]*")


def expand_hosts(text: str) -> list[str]:
    """The hosts of a list, in its order, each as often as it is there.

    Args:
        text: Names with or without brackets, between commas or white space.

    Raises:
        LaunchError: It is malformed, empty, or has more than `MOST` hosts.
    """
    hosts: list[str] = []
    for item in _split(text):
        hosts.extend(_expand(item, text))
        if len(hosts) > MOST:
            raise _mistake(text, f"more than {MOST} hosts")
    if not hosts:
        raise _mistake(text, "no host")
    return hosts


def _split(text: str) -> list[str]:
    """The items between commas that are not in brackets."""
    items, depth, begin = [], 0, 0
    for index, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise _mistake(text, f"a {character!r} too many")
        if depth == 0 and (character == "," or character.isspace()):
            items.append(text[begin:index])
            begin = index + 1
    if depth:
        raise _mistake(text, "a ']' is missing")
    return [item for item in [*items, text[begin:]] if item]


def _expand(item: str, text: str) -> list[str]:
    address = _IPV6.fullmatch(item)
    if address:
        item = address[1]
    choices: list[list[str]] = []
    count = 1
    for plain, inside in _PART.findall(item) if not address else [(item, "")]:
        choices.append([plain])
        if inside or f"{plain}[]" in item:
            choices.append(_numbers(inside, text))
            count *= len(choices[-1])
            if count > MOST:
                raise _mistake(text, f"more than {MOST} hosts")
    names = ["".join(parts) for parts in itertools.product(*choices)]
    for name in names:
        if not _NAME.fullmatch(name):
            raise _mistake(text, f"{name!r} is no name of a host")
    return names


def _numbers(inside: str, text: str) -> list[str]:
    """What a bracket stands for."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise _mistake(text, f"{part!r} in brackets: a number or a range like 01-16")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _mistake(text, f"the range {part!r} ends before it begins")
        if int(last) - int(first) >= MOST:
            raise _mistake(text, f"more than {MOST} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _mistake(text: str, why: str) -> LaunchError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return LaunchError(f"host list {shown!r}: {why}; write it like `gpu[01-16,20],login1`")
