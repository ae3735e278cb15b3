"""Holds the members that sources of files have in common: tars and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jest_stream.config import StorageConfig
from jest_stream.storage import Storage, redacted, scheme_of
from jest_stream.types import Source


class StoredSource(Source):
    """Reads a list of files, each a shard, through a `Storage`, which it owns.

    Args:
      storage: how remote files are read.
    """

    def __init__(self, storage: StorageConfig | None) -> None:
        self._storage = Storage(storage)
        self._files: Sequence[Any] = ()  # each has a `url`

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self._files)

    def shard_name(self, shard: int) -> str:
        """Returns the path or address of a file, without secrets."""
        url = self._files[shard].url
        return redacted(url) if scheme_of(url) else url

    def take_counts(self) -> dict[str, int]:
        """Returns storage's counts (bytes, retries, ...) of this process since the last call."""
        return self._storage.take_counts()

    def close(self) -> None:
        """Closes the files and connections of this process; reading opens them anew."""
        self._storage.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.num_shards} shards | {self.shard_name(0)} ...>"

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        # An error that the user keeps holds the half-made source by its traceback, and with it the
        # connections.
        try:
            yield
        except BaseException:
            self._storage.close()
            raise
