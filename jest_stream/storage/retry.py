"""Limits how long one read is tried: attempts, pauses between them, and the error at the end.

In: the failures of attempts, and the bytes that arrived. Out: seconds to wait, or the error that
the user sees. Sleeps nowhere; used by one thread or task at a time.
"""

from __future__ import annotations

import logging
import random
import time

from jest_stream.config import StorageConfig
from jest_stream.errors import ShardChangedError, ShardError, ShardUnavailableError
from jest_stream.storage.addresses import store_of
from jest_stream.storage.failures import AttemptFailed
from jest_stream.storage.redaction import redacted

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 20.0

# At this speed or above, reading may exceed the time limit: for 8 MiB, by another 8 minutes.
SLOWEST_BYTES_PER_S = 16 * 1024

_LOGGER = logging.getLogger("jest_stream")

_HINTS = {
    "s3": "Credentials are found as by the AWS tools (environment, profile, instance role), or "
    'passed: StorageConfig(options={"s3": {"key": ..., "secret": ...}}); for a public bucket '
    '{"anon": True}.',
    "gs": "Credentials are found as by gcloud, or passed: StorageConfig(options={'gs': {'token': "
    "...}}); for a public bucket {'token': 'anon'}.",
    "hf": "For a private or gated repository, log in with `hf auth login`, set HF_TOKEN, or pass "
    'StorageConfig(options={"hf": {"token": ...}}).',
    "http": "Headers with credentials are passed so: StorageConfig(options={'http': {'headers': "
    "{...}}}); a presigned address may have expired.",
}


class RetryBudget:
    """Counts the attempts of one read and tells how long to wait before the next.

    The time limit counts from the first attempt; it grows only while bytes keep arriving.

    Args:
      url: the shard, as the user wrote it.
      config: holds the time limit.
      generator: draws the jitter: lanes that failed together do not come back together.
      is_writing: whether a write is tried.
    """

    def __init__(
        self,
        url: str,
        config: StorageConfig,
        generator: random.Random,
        *,
        is_writing: bool = False,
    ) -> None:
        self.attempts = 0
        self._url = url
        self._limit_s = config.retry_timeout_s
        self._generator = generator
        self._is_writing = is_writing
        self._start = time.monotonic()
        self._failures = 0  # in a row, without a byte in between
        self._num_bytes = 0  # that arrived: each 16 KiB add a second to the limit

    def progressed(self, num_bytes: int) -> None:
        """Notes bytes that arrived: the next pause is a short one again."""
        self._failures = 0
        self._num_bytes += num_bytes

    @property
    def is_over(self) -> bool:
        """Tells whether the time is up."""
        return self._left_s() <= 0

    def pause_after(self, failure: AttemptFailed, offset: int = 0) -> float:
        """Returns the seconds to wait before the next attempt.

        Raises:
          ShardUnavailableError: if there will be none.
          ShardChangedError: if the object is another now.
        """
        if failure.kind != "again":
            raise self._error(failure, offset, "")
        # 0.2, 0.4, 0.8, ... 20 s. The exponent is bounded since 2.0 ** 1024 overflows.
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        if failure.retry_after_s is not None:
            # Never earlier than the server asks; up to a tenth later.
            pause_s = max(pause_s, failure.retry_after_s) * self._generator.uniform(1.0, 1.1)
        else:
            pause_s *= self._generator.uniform(0.5, 1.0)
        if pause_s > self._left_s():  # now, rather than after a pause that ends in the same error
            asked = failure.retry_after_s
            why = f"; the server asks to wait {asked:.0f} s" if asked else ""
            raise self._error(failure, offset, why)
        _LOGGER.info(
            "shard %s, byte %d: attempt %d failed: %s; next in %.1f s",
            redacted(self._url),
            offset,
            self.attempts,
            failure,
            pause_s,
        )
        return pause_s

    def _left_s(self) -> float:
        limit_s = self._limit_s + self._num_bytes / SLOWEST_BYTES_PER_S
        return self._start + limit_s - time.monotonic()

    def _error(self, failure: AttemptFailed, offset: int, why: str) -> ShardError:
        """Returns the error that the user sees. There are four cases."""
        shard = redacted(self._url)
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        is_about_access = failure.kind == "never" and failure.status in (0, 401, 403, 404)
        hint = _HINTS[store_of(self._url)] if is_about_access else ""
        # 1. A write that failed.
        if self._is_writing:
            return ShardUnavailableError(
                f"cannot write {shard!r}: {failure} ({times}{why}, "
                f"retry_timeout_s={self._limit_s:g}). Files written before are whole; go on by "
                f"starting again. {hint or 'Check server and network.'}",
                shard=shard,
                attempts=self.attempts,
            )
        # 2. An object that was replaced.
        if failure.kind == "changed":
            return ShardChangedError(
                f"shard {shard!r} changed while it was read: at byte {offset:,}, {failure}. The "
                "bytes read before and those that would be read now do not belong together. Make "
                "the source anew, and never overwrite shards that are in use.",
                shard=shard,
                offset=offset,
            )
        # 3. A failure that no other attempt can mend.
        if failure.kind == "never":
            message = (
                f"{failure} ({times}; trying again would not help). Training would go on without "
                f"its examples. {hint}"
            )
        # 4. Time is up.
        else:
            message = (
                f"gave up after {times} in {time.monotonic() - self._start:.1f} s{why} "
                f"(retry_timeout_s={self._limit_s:g}); the last: {failure}. Check the server and "
                "the network, or raise retry_timeout_s."
            )
        return ShardUnavailableError(
            f"cannot read shard {shard!r} at byte {offset:,}: {message.rstrip()}",
            shard=shard,
            offset=offset,
            attempts=self.attempts,
        )
