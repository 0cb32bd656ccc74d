"""Processes that end with the one that started them, however it ends: it holds the other end of their stdin."""

from __future__ import annotations

import os
import threading


def end_with_parent() -> None:
    """From now on this process ends at once when its stdin is closed."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    while os.read(0, 1):  # sys.stdin has a lock, which the interpreter would not get at its end
        pass
    os._exit(1)
