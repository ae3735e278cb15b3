"""No process, thread or descriptor may survive a test that uses these checks.

    from support.leaks import no_leaks

    pytestmark = pytest.mark.usefixtures("no_leaks")   # for every test of a module

or `with nothing_left_behind():` around a part of one. Those that end a moment later, by
themselves, are waited for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import psutil
import pytest

_PATIENCE_S = 5.0


_SERVERS = {"weed"}  # of the whole session: no test's own


def children() -> list[psutil.Process]:
    """Returns the living processes that this one started, and theirs; none that are no test's own.

    Those are servers of the whole session, and the helper that Python keeps once it has spawned.
    """
    found = psutil.Process().children(recursive=True)
    return [child for child in found if _counts(child)]


def descriptors() -> dict[int, str]:
    """Returns what is open, by number; without what torch keeps open once used."""
    opened = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # of the listing itself
        if target not in ("/dev/urandom", "/dev/random"):
            opened[int(number)] = target
    return opened


def stop_helpers() -> None:
    """Ends the processes that multiprocessing keeps for later children."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Asserts that no process, thread or descriptor is there afterwards that was not before."""
    resource_tracker.ensure_running()  # its pipe stays
    processes, threads, opened = set(children()), set(threading.enumerate()), descriptors()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    pause = threading.Event()
    while True:
        left = [
            *(child for child in children() if child not in processes),
            *(thread for thread in threading.enumerate() if thread not in threads),
            *(f"{k}: {v}" for k, v in descriptors().items() if opened.get(k) != v),
        ]
        if not left or time.monotonic() > deadline:
            break
        pause.wait(0.02)
    assert left == [], f"left behind: {left}"


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Every test that uses it leaves nothing behind, however it ends."""
    with nothing_left_behind():
        yield


def _counts(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE or process.name() in _SERVERS:
            return False
        return not any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False
