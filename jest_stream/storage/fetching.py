"""Sends requests until they succeed or their time is up: segments, lengths, listings, uploads.

In: a driver and the object. Out: bytes in a `Segment`, an `ObjectInfo`, a listing. A segment that
fails half-way is asked for again from the byte where it broke off, under the condition that the
object is still the same. Coroutines run on fsspec's loop, `retried` in the caller's thread.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError, JESTError
from jest_stream.storage.connections import Connections
from jest_stream.storage.drivers import Driver
from jest_stream.storage.failures import AttemptFailed, failure_of
from jest_stream.storage.read_ahead import ReadAhead, Segment
from jest_stream.storage.responses import info_of, num_bytes_to_read
from jest_stream.storage.retry import RetryBudget
from jest_stream.types import ObjectInfo

_Result = TypeVar("_Result")

MAX_CONCURRENT_INFOS = 32
"""Lengths that are asked for at once."""


class Fetcher:
    """Sends requests until they succeed or their time is up, and counts them.

    Args:
      config: the time limits.
      connections: of this process.
    """

    def __init__(self, config: StorageConfig, connections: Connections) -> None:
        self._config = config
        self._connections = connections
        self._generator = random.Random()  # jitter only; never the user's random state
        self._lock = threading.Lock()  # guards _counts: the loop and callers' threads add to them
        self._counts: Counter[str] = Counter()

    def take_counts(self) -> dict[str, int]:
        """Returns bytes, requests and retries since the last call."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts

    async def read_segment(self, read_ahead: ReadAhead, segment: Segment, driver: Driver) -> None:
        """Reads a segment to its end, or finishes it with the error that makes that impossible."""
        budget = self._budget(segment.window.url)
        try:
            while segment.start + segment.filled < segment.end and not segment.is_dropped:
                offset = segment.start + segment.filled
                await self._attempt(
                    budget,
                    offset,
                    lambda: self._read_response(read_ahead, segment, driver, budget),
                )
        except Exception as error:
            read_ahead.finish(segment, error)
        else:
            read_ahead.finish(segment, None)

    async def infos(self, driver: Driver, urls: list[str]) -> list[ObjectInfo]:
        """Returns length and version of each object, in order."""
        turns = asyncio.Semaphore(MAX_CONCURRENT_INFOS)

        async def _one(url: str) -> ObjectInfo:
            async with turns:
                budget = self._budget(url)
                while True:
                    found = await self._attempt(budget, 0, lambda: self._info(driver, url))
                    if found is not None:
                        return found

        tasks = [asyncio.ensure_future(_one(url)) for url in urls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # `gather` raises the first error and lets the other requests run on.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def matches(
        self, driver: Driver, pattern: str, limit_s: float
    ) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the objects that match, in one attempt: a listing cannot be resumed."""
        try:
            return await asyncio.wait_for(driver.matches(pattern), limit_s)
        except TimeoutError as error:
            # Two limits end in this class: 1. that of one request, of which aiohttp raises a
            # subclass: it is told like any failure. 2. The one here, for all pages together.
            if type(error) is not asyncio.TimeoutError:
                raise
        raise AttemptFailed("again", f"its listing has not ended after {limit_s:.0f} s")

    async def put(self, driver: Driver, url: str, path: str) -> None:
        """Writes a local file as an object; done again whole where that helps."""
        budget = RetryBudget(url, self._config, self._generator, is_writing=True)

        async def _put() -> bool:
            await driver.put(url, path)
            return True

        while not await self._attempt(budget, 0, _put):
            pass

    def retried(self, url: str, call: Callable[[], _Result]) -> _Result:
        """Returns the result of a blocking call, repeated while that helps."""
        budget = self._budget(url)
        while True:
            budget.attempts += 1
            try:
                return call()
            except (JESTError, MemoryError):
                raise
            except Exception as error:
                failure = failure_of(error)
            time.sleep(self._pause(budget, failure, 0))

    async def _attempt(
        self, budget: RetryBudget, offset: int, call: Callable[[], Awaitable[_Result]]
    ) -> _Result | None:
        """Returns the result of one attempt; None after it failed and its pause is over."""
        budget.attempts += 1
        self._count("storage_requests", 1)
        # There are four ends: 1. a result. 2. An error that is the user's to mend, or no memory:
        # raised at once. 3. Silence of the server. 4. Any other error: the budget tells whether
        # another attempt may help, and raises if none can.
        try:
            return await call()
        except (ConfigError, MemoryError):
            raise
        except TimeoutError as error:  # aiohttp's are of this kind, too
            failure = AttemptFailed("again", self._stalled(error))
        except Exception as error:
            failure = failure_of(error)
        # Outside of the handler: the user's error has no cause whose text could hold a secret.
        await asyncio.sleep(self._pause(budget, failure, offset))
        return None

    async def _read_response(
        self,
        read_ahead: ReadAhead,
        segment: Segment,
        driver: Driver,
        budget: RetryBudget,
    ) -> None:
        """Reads a segment on from where it is, as far as one response goes.

        There are four ends: 1. All bytes arrived. 2. The connection broke: the next attempt goes
        on from here. 3. Nobody wants the segment any more. 4. Bytes trickle so slowly that the time
        is up: that is a failure, although each one comes before `stall_timeout_s`.
        """
        url, expected = segment.window.url, segment.window.expected
        start = segment.start + segment.filled
        limit_s = self._config.connect_timeout_s + self._config.stall_timeout_s
        response = await asyncio.wait_for(
            driver.request(url, start, segment.end, expected.version), limit_s
        )
        try:
            wanted = num_bytes_to_read(
                response, start, segment.end, expected, driver.version_of(url, response)
            )
            left = wanted
            while left:
                data = await response.read()
                if not data:
                    raise AttemptFailed(
                        "again", f"the response ended after {wanted - left:,} of {wanted:,} bytes"
                    )
                data = data[:left]  # a server may send more than the range
                left -= len(data)
                budget.progressed(len(data))
                self._count("storage_bytes", len(data))
                if not read_ahead.fill(segment, data):
                    return
                if left and budget.is_over:
                    raise AttemptFailed("again", "it is too slow to end in time")
        finally:
            await response.close()

    async def _info(self, driver: Driver, url: str) -> ObjectInfo:
        limit_s = self._config.connect_timeout_s + self._config.stall_timeout_s
        try:
            response = await asyncio.wait_for(driver.request(url, 0, 1, ""), limit_s)
        except OSError as error:  # s3fs raises where others return the response
            if failure_of(error).status == 416:  # no first byte: the object is empty
                return ObjectInfo(0)
            raise
        try:
            found = info_of(response, driver.version_of(url, response))
            if response.status == 206:
                await response.read()  # the one byte, so that the connection can be used again
            return found
        finally:
            await response.close()

    def _budget(self, url: str) -> RetryBudget:
        return RetryBudget(url, self._config, self._generator)

    def _pause(self, budget: RetryBudget, failure: AttemptFailed, offset: int) -> float:
        pause_s = budget.pause_after(failure, offset)
        self._count("storage_retries", 1)
        return pause_s

    def _stalled(self, error: BaseException) -> str:
        # aiohttp and botocore have several timeouts for a connection, all with "onnect" in them.
        if "onnect" in f"{type(error).__name__}{error}":
            return f"no connection within {self._config.connect_timeout_s:g} s"
        return f"stalled: no byte within {self._config.stall_timeout_s:g} s"

    def _count(self, name: str, number: int) -> None:
        with self._lock:
            self._counts[name] += number
