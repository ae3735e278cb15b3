"""Tests of remote storage share these: settings that give up soon, patterned data, leak checks.

`nothing_survives` is a fixture for whole modules; import it there.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fsspec.asyn import get_loop

from jest_stream.config.storage import StorageConfig
from support.leaks import nothing_left_behind

SOON = StorageConfig(connect_timeout_s=2, stall_timeout_s=0.5, retry_timeout_s=3)
"""Gives up within seconds."""
AT_ONCE = StorageConfig(connect_timeout_s=1, stall_timeout_s=0.3, retry_timeout_s=0.5)
"""Gives up after two or three attempts."""


def noise(num_bytes: int, seed: int = 0) -> bytes:
    """Returns bytes in which every place is different from every other."""
    return random.Random(seed).randbytes(num_bytes)


def num_tasks() -> int:
    """Returns how many tasks are alive on fsspec's loop."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), get_loop()).result(5)


def until(is_so: Callable[[], bool], limit_s: float = 10) -> None:
    """Waits for something that another thread or process does; fails if it does not come."""
    deadline, pause = time.monotonic() + limit_s, threading.Event()
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.005)


def start_loop() -> None:
    """Starts fsspec's loop with the helper threads that it would start when it needs them."""
    num_cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    num_threads = min(32, num_cores + 4)  # the size that asyncio's executor grows to
    loop, barrier = get_loop(), threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        loop.call_soon_threadsafe(loop.run_in_executor, None, barrier.wait, 5)
    barrier.wait(5)


@pytest.fixture(autouse=True)
def nothing_survives() -> Iterator[None]:
    """Every test ends with the processes, threads, sockets and tasks that it began with.

    fsspec's loop is a thread of the process, with a few more for calls that block, such as name
    lookups. They stay, so they are there before the test.
    """
    start_loop()
    before = num_tasks()
    with nothing_left_behind():
        yield
    # Some end a moment later, on their own: those of the test before, too, that were counted here.
    until(lambda: num_tasks() <= before)
