"""Adds to each example of a source its cached reference embeddings: source in, source out.

Reads the cache's file of a shard while it reads the shard. Works in worker processes: it holds the
manifest and a `Storage`, and each process maps the files that it reads. Nothing outlives the
reading of a shard but the storage's connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

from jest_stream.errors import (
    BadExampleError,
    CachedShardChangedError,
    NotCachedError,
    ReferenceMismatchError,
)
from jest_stream.reference_cache.manifest import ShardRecord, short_name
from jest_stream.reference_cache.rows import ShardRows
from jest_stream.types import REFERENCE_ROW, Example, Source, WrappedSource


class EmbeddingStore(Protocol):
    """The members of a `ReferenceCache` that a join reads; the class explains them."""

    @property
    def path(self) -> str:
        """Address of the cache, without secrets."""

    @property
    def source(self) -> str:
        """Fingerprint of the source that was cached."""

    @property
    def is_by_key(self) -> bool:
        """Tells whether its source has no shards, so that examples are matched by key alone."""

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """The records of the shards."""

    def open_shard(self, shard: int, *, first: int) -> ShardRows:
        """Returns a reader of a shard's embeddings, from example `first` on."""

    def take_counts(self) -> dict[str, int]:
        """Returns the storage's counts since the last call."""

    def close(self) -> None:
        """Closes the storage's connections."""


class JoinedSource(WrappedSource):
    """Reads the examples of a source, each with its reference embeddings from a cache.

    An example holds them as `__reference__`. In place of an example that the cache lacks, a
    `NotCachedError` is yielded.

    Args:
      source: the source to read.
      cache: the cache of this source, or of one that has its shards among others.

    Raises:
      ReferenceMismatchError: if a shard of the source is not in the cache.
    """

    def __init__(self, source: Source, cache: EmbeddingStore) -> None:
        super().__init__(source)
        self._cache = cache
        self._places = _places(source, cache)

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields examples with their embeddings; see `types.Source`.

        Raises:
          CachedShardChangedError: if the shard is not as it was cached.
          CacheDamagedError: if the file of the cache is not whole.
          ShardUnavailableError: if it cannot be read.
        """
        record = self._cache.shards[self._places[shard]]
        name = self.shard_name(shard)
        # A changed shard is noticed three times: by length and version here, by checksums where an
        # example is decoded, and by the number of examples at the end.
        content = self._source.shard_content(shard)
        if content is not None and (difference := _difference(record, content, name)):
            raise _changed(name, self._cache.path, difference)
        rows = self._cache.open_shard(self._places[shard], first=index)
        reading: Any = self._source.read(shard, offset=offset, index=index)
        with closing(reading):
            for example, next_offset in reading:
                index += 1
                if isinstance(example, BadExampleError):
                    yield example, next_offset
                elif (found := rows.take(example["__key__"])) is None:
                    yield self._not_cached(example["__key__"], name, record), next_offset
                else:
                    yield {**example, REFERENCE_ROW: found}, next_offset
        # A stream may hold some of the cached examples, as those of several ranks do, or repeat
        # them.
        if index != record.num_read and not self._cache.is_by_key:
            difference = f"it held {record.num_read:,} examples, and holds {index:,}"
            raise _changed(name, self._cache.path, difference)

    def take_counts(self) -> dict[str, int]:
        """Returns the counts of the source and of the cache's storage since the last call."""
        counts = self._source.take_counts()
        for name, amount in self._cache.take_counts().items():
            counts[name] = counts.get(name, 0) + amount
        return counts

    def close(self) -> None:
        """Closes the connections of the source and of the cache."""
        self._source.close()
        self._cache.close()

    def __repr__(self) -> str:
        return f"<JoinedSource {self._source!r} with {self._cache.path!r}>"

    def _not_cached(self, key: str, name: str, record: ShardRecord) -> NotCachedError:
        left = ", ".join(f"{count} {reason}" for reason, count in record.skipped.items())
        return NotCachedError(
            f"example {key!r} of shard {name!r} is not in the reference cache "
            f"{self._cache.path!r}, which has {record.num_examples:,} of the {record.num_read:,} "
            f"examples of that shard (left out when it was built: {left or 'none'}). Without a "
            f"reference it cannot be scored. Build the cache of this data, or pass "
            f'on_bad_example="skip" to leave out and count such examples.',
            key=key,
            shard=name,
            reason="not_cached",
        )


def _places(source: Source, cache: EmbeddingStore) -> list[int]:
    """Returns, for each shard of the source, its number in the cache."""
    # There are three cases: 1. the very source that was cached; 2. a stream without shards, whose
    # examples are found by key; 3. some of the cached shards, perhaps in another folder or order:
    # they are matched by their names.
    if source.fingerprint == cache.source and source.num_shards == len(cache.shards):
        return list(range(source.num_shards))
    if cache.is_by_key and source.num_shards == 1:
        return [0]
    names = [short_name(source.shard_name(shard)) for shard in range(source.num_shards)]
    cached = {short_name(record.name): place for place, record in enumerate(cache.shards)}
    missing = [name for name in names if name not in cached]
    is_ambiguous = len(cached) < len(cache.shards) or len(set(names)) < len(names)
    if not missing and not is_ambiguous:
        return [cached[name] for name in names]
    if missing:
        why = (
            f"{len(missing):,} of its {len(names):,} shards are not in it, such as {missing[0]!r} "
            f"(the cache has {next(iter(cached), 'none')!r} and others, {len(cached):,} in all)"
        )
    else:
        why = "its shards have names that come twice, so that only the same list can be matched"
    raise ReferenceMismatchError(
        f"the reference cache {cache.path!r} is of other data than the source: {why}. Build a "
        f"cache of this source, or pass the source that was cached."
    )


def _difference(record: ShardRecord, content: tuple[int, str], name: str) -> str:
    num_bytes, version = content
    if record.num_bytes not in (None, num_bytes):
        return f"it had {record.num_bytes:,} bytes, and has {num_bytes:,}"
    # A copy elsewhere has another ETag; under the same address it means other content.
    if record.version and version and record.name == name and record.version != version:
        return f"its version was {record.version}, and is {version}"
    return ""


def _changed(name: str, path: str, difference: str) -> CachedShardChangedError:
    return CachedShardChangedError(
        f"shard {name!r} has changed since its embeddings were cached in {path!r}: {difference}. "
        f"They say nothing of its present content. Build a cache of the data as it is.",
        shard=name,
    )
