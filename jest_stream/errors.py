"""Names every error that a user can meet.

A message names the fault, the value found, its consequence and the remedy. `ConfigError` is about
arguments; the others are about the data, the models or a checkpoint. All survive pickling with
their attributes, since many are raised in worker processes.
"""

from __future__ import annotations

from typing import Any


class JESTError(Exception):
    """Base of all errors of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(JESTError, ValueError):
    """An argument that cannot work, named as the user wrote it."""


class ShardError(JESTError):
    """A shard that cannot be read to its end.

    Attributes:
      shard: path of the shard.
      offset: byte offset where reading failed.
    """

    def __init__(self, message: str, *, shard: str, offset: int = 0) -> None:
        super().__init__(message)
        self.shard = shard
        self.offset = offset


class ShardTruncatedError(ShardError):
    """A shard that ends before its end-of-archive marker: a shorter shard is never accepted."""


class ShardUnavailableError(ShardError):
    """A shard that cannot be opened.

    Attributes:
      attempts: how often it was tried.
    """

    def __init__(self, message: str, *, shard: str, offset: int = 0, attempts: int = 1) -> None:
        super().__init__(message, shard=shard, offset=offset)
        self.attempts = attempts


class ShardChangedError(ShardError):
    """A shard whose content is not that of when the source was made: another ETag or length."""


class UnsafeDataError(JESTError):
    """Data that could run code, reach outside the allow-list or exhaust memory."""


class BadExampleError(JESTError):
    """One example that cannot be used; `on_bad_example="skip"` counts it and goes on.

    Attributes:
      key: the example's key.
      shard: where it was read, empty if unknown.
      reason: a short name under which skipped examples are counted.
    """

    def __init__(self, message: str, *, key: str, shard: str = "", reason: str) -> None:
        super().__init__(message)
        self.key = key
        self.shard = shard
        self.reason = reason


class UnsafeExampleError(BadExampleError, UnsafeDataError):
    """One example that is unsafe to decode, such as an image of a billion pixels."""


class BadExampleLimitError(JESTError):
    """More bad examples than `on_bad_example="skip"` was meant for."""


class NonFiniteError(JESTError, ValueError):
    """Embeddings or scores that hold NaN or infinity: a choice among them would mean nothing."""


class ScoringMemoryError(JESTError, RuntimeError):
    """A device that has too little memory to score even one candidate at a time."""


class ReferenceMismatchError(JESTError):
    """A reference cache that does not belong to the reference, its views or the data at hand."""


class IncompleteCacheError(ReferenceMismatchError):
    """A reference cache whose building has not come to its end.

    Attributes:
      num_done: shards that are in it.
      num_shards: shards that the source has.
    """

    def __init__(self, message: str, *, num_done: int, num_shards: int) -> None:
        super().__init__(message)
        self.num_done = num_done
        self.num_shards = num_shards


class CacheDamagedError(ShardError, ReferenceMismatchError):
    """A file of a reference cache that was cut, or holds other bytes than were written."""


class CachedShardChangedError(ShardChangedError, ReferenceMismatchError):
    """A shard whose content is not that of when its embeddings were cached."""


class NotCachedError(BadExampleError, ReferenceMismatchError):
    """An example whose reference embeddings are not in the cache."""


class ResumeMismatchError(JESTError):
    """A checkpoint that was taken under other settings than it is loaded into."""


class ClosedError(JESTError, RuntimeError):
    """A dataset or an iterator that was closed, or whose stream another iterator has taken over."""


class WrongProcessError(JESTError, RuntimeError):
    """A dataset that was copied, or iterated elsewhere than in the training process."""


class UserCodeError(JESTError, RuntimeError):
    """A transform, tokenizer, key, score or model that raised `StopIteration`: it ends loops."""


class WorkerDiedError(JESTError):
    """A worker process that ended without saying why."""


class StalledError(JESTError):
    """A worker process or another rank that has given nothing for too long."""


def _rebuild(kind: type[JESTError], args: tuple[Any, ...], attributes: dict[str, Any]) -> JESTError:
    """Unpickles an error whose constructor takes keywords, which `Exception` cannot do."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
