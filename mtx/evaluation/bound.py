"""Becomes another program, whose process ends when the one that started it does.

    python -m mtx.evaluation.bound PARENT_PID PROGRAM ARGUMENT...

A process that has imported JAX cannot arrange this itself: what it runs between fork and exec may deadlock. Only Linux
has the means; elsewhere the program merely starts.

Invariant: a program whose parent is gone already does not start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, words: list[str]) -> None:
    """Does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # kept by what the process becomes
    if os.getppid() == parent:
        os.execv(words[0], words)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
