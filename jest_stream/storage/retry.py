"""How long one read is tried: attempts, pauses between them, and the error at the end."""

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

# What arrives at least this fast may take longer than the time limit: 8 MiB, another 8 minutes.
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


class Patience:
    """Counts the attempts of one read and says how long to wait before the next.

    The limit is on the time since the first attempt, longer only while bytes keep arriving. Used by
    one thread or task at a time.

    Args:
      url: the shard, as the user wrote it.
      config: holds the time limit.
      generator: draws the jitter, so that lanes that failed together do not come back together.
      is_writing: whether it is a write that is tried.
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
        self._num_bytes = 0

    def progressed(self, num_bytes: int) -> None:
        """Notes bytes that arrived: the next pause is a short one again."""
        self._failures = 0
        self._num_bytes += num_bytes

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._left_s() <= 0

    def pause_after(self, failure: AttemptFailed, offset: int = 0) -> float:
        """Returns the seconds to wait before the next attempt.

        Raises:
          ShardUnavailableError: if there will be none.
          ShardChangedError: if the object is another now.
        """
        if failure.kind != "again":
            raise self._error(failure, offset, "")
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        if failure.retry_after_s is not None:
            pause_s = max(pause_s, failure.retry_after_s) * self._generator.uniform(1.0, 1.1)
        else:
            pause_s *= self._generator.uniform(0.5, 1.0)
        if pause_s > self._left_s():
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
        """Returns the error that the user sees."""
        shard = redacted(self._url)
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        if self._is_writing:
            return self._not_written(shard, failure, f"{times}{why}")
        if failure.kind == "changed":
            return ShardChangedError(
                f"shard {shard!r} changed while it was read: at byte {offset:,}, {failure}. What "
                "was read before and what would be read now do not belong together. Make the "
                "source anew, and never overwrite shards that are in use.",
                shard=shard,
                offset=offset,
            )
        if failure.kind == "never":
            is_about_access = failure.status in (0, 401, 403, 404)
            advice = f" {_HINTS[store_of(self._url)]}" if is_about_access else ""
            return ShardUnavailableError(
                f"cannot read shard {shard!r} at byte {offset:,}: {failure} ({times}; trying again "
                f"would not help). Training would go on without its examples.{advice}",
                shard=shard,
                offset=offset,
                attempts=self.attempts,
            )
        return ShardUnavailableError(
            f"cannot read shard {shard!r} at byte {offset:,}: gave up after {times} in "
            f"{time.monotonic() - self._start:.1f} s{why} (retry_timeout_s={self._limit_s:g}); the "
            f"last: {failure}. Check the server and the network, or raise retry_timeout_s.",
            shard=shard,
            offset=offset,
            attempts=self.attempts,
        )

    def _not_written(self, shard: str, failure: AttemptFailed, tried: str) -> ShardError:
        is_about_access = failure.kind == "never" and failure.status in (0, 401, 403, 404)
        advice = _HINTS[store_of(self._url)] if is_about_access else "Check server and network."
        return ShardUnavailableError(
            f"cannot write {shard!r}: {failure} ({tried}, "
            f"retry_timeout_s={self._limit_s:g}). What was written before is whole; go on by "
            f"starting again. {advice}",
            shard=shard,
            attempts=self.attempts,
        )
