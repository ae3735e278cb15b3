"""Keeps the connections of one process: made at the first use, closed before a fork and on `close`.

In: an address. Out: a connected driver, and coroutines run on fsspec's loop. That is one daemon
thread, shared by everything in the process that uses fsspec, with a few helper threads for name
lookups. It is started at the first remote read and stays; nothing else outlives `close`. All
retries are ours and counted, but for one: below s3fs, aiohttp repeats a request once whose
connection broke before a response came.

A forked child starts without the loop and without our sockets: they are closed in the parent just
before the fork, and made anew when they are needed again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError, StalledError
from jest_stream.storage.addresses import store_of
from jest_stream.storage.drivers import Driver, GoogleDriver, S3Driver, WebDriver
from jest_stream.storage.hub_driver import HubDriver

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "hf": "huggingface_hub"}

_Result = TypeVar("_Result")
_CLOSE_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 60.0  # an S3 client reads its service description and looks for credentials

_LOGGER = logging.getLogger("jest_stream")


class Connections:
    """Keeps the drivers of this process, by kind of store, and the tasks that use them.

    Args:
      config: time limits and options.
      before_fork: called in the parent before it forks; stops the reads on their way.
    """

    def __init__(self, config: StorageConfig, before_fork: Callable[[], None]) -> None:
        self.before_fork = before_fork
        self._config = config
        self._lock = threading.Lock()  # guards _drivers, also while one connects
        self._drivers: dict[str, Driver] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # touched on the loop only
        _LIVE.add(self)

    def driver(self, url: str) -> Driver:
        """Returns the connected driver for an address.

        Raises:
          ConfigError: if its package is missing.
        """
        kind = store_of(url)
        # Other threads wait while one connects: two clients would ask for credentials twice, and
        # one of them would never be closed.
        with self._lock:
            if kind not in self._drivers:
                driver = make_driver(kind, self._config)
                self.run(driver.connect, timeout_s=_CONNECT_TIMEOUT_S)
                self._drivers[kind] = driver
            return self._drivers[kind]

    def connected(self, url: str) -> Driver:
        """Returns the driver for an address that was connected before; never waits."""
        return self._drivers[store_of(url)]

    def start(
        self, function: Callable[..., Awaitable[_Result]], *arguments: Any
    ) -> concurrent.futures.Future[_Result]:
        """Runs `await function(*arguments)` on the loop; cancelling the future cancels it."""
        from fsspec.asyn import get_loop

        return asyncio.run_coroutine_threadsafe(self._tracked(function, *arguments), get_loop())

    def run(
        self, function: Callable[..., Awaitable[_Result]], *arguments: Any, timeout_s: float
    ) -> _Result:
        """Runs `await function(*arguments)` on the loop and waits; an interrupt cancels it.

        Raises:
          StalledError: if it takes longer than `timeout_s`.
        """
        future = self.start(function, *arguments)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise  # the function itself raised it, for a limit that it has
            raise StalledError(
                f"a storage request did not end within {timeout_s:.0f} s although it has its own "
                "limits: is fsspec's loop (thread fsspecIO) blocked by something else?"
            ) from None
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancels every request and closes every socket; the next request connects again."""
        from fsspec.asyn import get_loop

        drivers = list(self._drivers.values())
        if not drivers:
            return
        if asyncio._get_running_loop() is get_loop():  # garbage was collected there: do not wait
            self.start(self._close, drivers)
        else:
            self.run(self._close, drivers, timeout_s=_CLOSE_TIMEOUT_S)

    async def _tracked(
        self, function: Callable[..., Awaitable[_Result]], *arguments: Any
    ) -> _Result:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await function(*arguments)
        finally:
            self._tasks.discard(task)

    async def _close(self, drivers: list[Driver]) -> None:
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for driver in drivers:
            await driver.close()
        await asyncio.sleep(0)  # transports close their sockets in the next round of the loop


_LIVE: weakref.WeakSet[Connections] = weakref.WeakSet()

# Sockets that a child inherited in spite of all. Collected there, they would take the parent's
# off the epoll instance that both share.
_INHERITED: list[object] = []


def _before_fork() -> None:
    for connections in list(_LIVE):
        try:
            connections.before_fork()
            connections.close()
        except Exception:
            _LOGGER.warning("cannot close storage connections before a fork", exc_info=True)


def _after_fork_in_child() -> None:
    # The child must not touch them: not close a socket, since the parent uses it, and not take a
    # lock, since the thread that holds it does not exist here.
    for connections in list(_LIVE):
        _INHERITED.append(connections._drivers)
        _INHERITED.append(connections._tasks)
    _LIVE.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def make_driver(store: str, config: StorageConfig) -> Driver:
    """Returns a driver for a kind of store (see `store_of`), not yet connected.

    Raises:
      ConfigError: if its package is not installed, or does not take the options.
    """
    package = _PACKAGES[store]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"reading {store}:// needs the package {package}, which cannot be imported ({error}). "
            f"Install it: pip install {package}"
        ) from error
    drivers: dict[str, type[Any]] = {
        "s3": S3Driver,
        "gs": GoogleDriver,
        "http": WebDriver,
        "hf": HubDriver,
    }
    # The options are the user's, and go to a constructor of fsspec: of a misspelt name it raises
    # a TypeError.
    try:
        driver: Driver = drivers[store](config)
    except TypeError as error:
        raise ConfigError(
            f"StorageConfig.options[{store!r}] do not fit {package}: {error}. They are the keyword "
            f"arguments of its fsspec filesystem: {sorted(config.options.get(store, {}))}"
        ) from None
    return driver
