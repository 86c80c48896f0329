"""Limits: stop Python code of others that takes too long or too much memory.

with within(seconds=60, num_bytes=2 * 2**30):
    library.loops_over_anything()
"""

import ctypes
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 0.05


class OverLimit(Exception):
    """More time or memory than was granted; the message says which and how much."""


@contextmanager
def within(seconds: float, num_bytes: int) -> Generator[None]:
    """Raise `OverLimit` in this thread when the block takes more time or memory than granted.

    It is raised between two steps of Python code: one call into a library's own machine code is not
    interrupted, and is looked at when it returns. Memory is what the whole process has grown by; it
    is known on Linux, and elsewhere not limited.

    Args:
        seconds: of wall time, above 0.
        num_bytes: of resident memory beside what the process has now.
    """
    thread, done, told = threading.get_ident(), threading.Event(), list[str]()
    begun, held = time.monotonic(), _resident()

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            grown = _resident() - held
            if time.monotonic() - begun > seconds:
                told.append(f"took more than {seconds:g} seconds")
            elif grown > num_bytes:
                told.append(f"took more than {num_bytes / 2**30:g} GiB of memory")
            else:
                continue
            _raise_in(thread, OverLimit)
            return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except OverLimit:
        raise OverLimit(told[0] if told else "was over a limit") from None
    finally:
        done.set()
        watcher.join()
    if told:
        raise OverLimit(told[0])


def _raise_in(thread: int, kind: type[Exception]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
