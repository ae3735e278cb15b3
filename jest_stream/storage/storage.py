"""Gives all other rooms their files, through `Storage`: shards and caches, local or remote.

In: addresses. Out: lists of shards, their lengths and versions, open files, new files. Reading runs
in the thread that calls; remote bytes arrive on fsspec's loop.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, BinaryIO

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.storage import addresses
from jest_stream.storage.connections import Connections
from jest_stream.storage.disk_cache import DiskCache
from jest_stream.storage.drivers import Driver
from jest_stream.storage.fetching import MAX_CONCURRENT_INFOS, Fetcher
from jest_stream.storage.local import BUFFER_BYTES, local_info, open_local
from jest_stream.storage.read_ahead import MAX_SEGMENT_BYTES, ReadAhead, Segment, Window
from jest_stream.storage.redaction import redacted
from jest_stream.storage.remote import RemoteFile
from jest_stream.storage.retry import SLOWEST_BYTES_PER_S
from jest_stream.storage.writing import NewFile, list_local, remove_unfinished, require_writable
from jest_stream.types import ObjectInfo

_DOWNLOAD_BYTES = 1 << 20


class _ProcessResources:
    """Holds the connections, requests, read-ahead and open files of one process."""

    def __init__(self, config: StorageConfig) -> None:
        self.connections = Connections(config, before_fork=lambda: self.read_ahead.stop())
        self.fetcher = Fetcher(config, self.connections)
        self.read_ahead = ReadAhead(config.read_ahead_bytes, self._fetch)
        self.files: weakref.WeakSet[RemoteFile] = weakref.WeakSet()
        self.listed: dict[str, ObjectInfo] = {}
        self.cache = _make_cache(config)

    def driver(self, url: str) -> Driver:
        """Returns the driver for an address; connects, which can fail as any request can."""
        return self.fetcher.retried(url, lambda: self.connections.driver(url))

    def close(self) -> None:
        """Closes files and connections."""
        for file in list(self.files):
            file.close()
        self.connections.close()

    def _fetch(self, segment: Segment) -> Future[None]:
        # Called under the lock of `read_ahead`, so it must not wait: the reader has connected.
        driver = self.connections.connected(segment.window.url)
        return self.connections.start(self.fetcher.read_segment, self.read_ahead, segment, driver)


class Storage:
    """Reads shards wherever they lie: local disk, S3, Google Cloud, the web, the Hub.

    Holds settings only until the first remote read: connections are made in the process that uses
    them, and a `Storage` can be pickled, forked and spawned. Safe to use from several threads.

    Args:
      config: how remote shards are read.
    """

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self._by_process: dict[int, _ProcessResources] = {}
        _make_cache(self.config)  # a folder that cannot be used is an error now, not later

    def expand(self, urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
        """Returns the shards that `urls` names, in the order written; matches of a glob sorted.

        Args:
          urls: a path, a `file://`, `s3://`, `gs://`, `http(s)://` or `hf://` address, a brace
            pattern (`{000..123}`, `{a,b}`), a glob, or a list of these. Globs of web servers need
            a page that links the files. Addresses of the Hub are pinned to a commit.

        Raises:
          ConfigError: if nothing matches, or a pattern cannot be expanded.
          UnsafeDataError: for `pipe:`, chained (`::`) and unknown addresses, and for patterns of
            more shards than make sense.
          ShardUnavailableError: if a store cannot be listed.
        """
        return addresses.expand(urls, self._list)

    def info(self, url: str) -> ObjectInfo:
        """Returns length and version of a shard.

        Args:
          url: as `expand` returned it.

        Raises:
          ShardUnavailableError: if it is not there, or cannot be reached.
          ConfigError: if it is a folder, or the package for its scheme is missing.
        """
        return self.infos([url])[0]

    def infos(self, urls: Sequence[str]) -> list[ObjectInfo]:
        """Returns length and version of each shard; remote ones are asked for side by side."""
        found: dict[str, ObjectInfo] = {}
        remote: dict[str, list[str]] = {}
        # There are three cases: 1. a local shard: one stat. 2. A match of a glob: its store listed
        # the length with the name. 3. Any other remote shard: a request, once for each address.
        for url in urls:
            if not addresses.scheme_of(url):
                found[url] = local_info(url)
            elif (listed := self.listed(url)) is not None:
                found[url] = listed
            elif url not in found:
                remote.setdefault(addresses.store_of(url), []).append(url)
        for group in remote.values():
            resources = self._resources()
            driver = resources.driver(group[0])
            # The fetcher asks for 32 lengths at once. 100 shards are 4 rounds, each of which may
            # take as long as one read with all its attempts.
            limit_s = (1 + len(group) // MAX_CONCURRENT_INFOS) * self._longest_wait_s()
            infos = resources.connections.run(
                resources.fetcher.infos, driver, group, timeout_s=limit_s
            )
            found.update(zip(group, infos, strict=True))
        return [found[url] for url in urls]

    def listed(self, url: str) -> ObjectInfo | None:
        """Returns length and version by the listing of a glob, once; None without a listing."""
        resources = self._by_process.get(os.getpid())
        return resources.listed.pop(url, None) if resources else None

    def check_fits(self, url: str, info: ObjectInfo) -> None:
        """Demands that a remote shard can be cached, if there is a cache.

        Raises:
          ConfigError: if it is larger than the cache.
        """
        if addresses.scheme_of(url) and (cache := self._resources().cache) is not None:
            cache.check_fits(url, info.num_bytes)

    def open(self, url: str, expected: ObjectInfo | None = None) -> BinaryIO:
        """Returns the shard, opened for reading: buffered, seekable, read ahead if remote.

        Reads of a remote shard raise `ShardUnavailableError` once all attempts are used up, and
        `ShardChangedError` if its content is no longer the expected; a later read tries again.

        Args:
          url: as `expand` returned it.
          expected: the result of `info`. None: it is asked for now.

        Raises:
          ShardUnavailableError: if it cannot be opened.
          ShardChangedError: if a local shard has another length than expected.
        """
        if not addresses.scheme_of(url):
            return open_local(url, expected)
        if expected is None:
            expected = self.info(url)
        cache = self._resources().cache
        if cache is not None:
            # Presigned addresses of one object differ from day to day; they share one entry.
            file = cache.open(
                addresses.without_signature(url),
                expected.num_bytes,
                expected.version,
                partial(self._download, url, expected),
            )
            if file is not None:
                return file
        return self._open_remote(url, expected)

    def mapped(self, url: str, expected: ObjectInfo | None = None) -> Any:
        """Returns all bytes of a file, `[n]` uint8 of numpy; mapped if on this disk or cached.

        Tensors can be made of them, since they are writable; the file never changes. They hold no
        descriptor.
        """
        import numpy as np
        import torch

        with self.open(url, expected) as file:
            try:
                number = file.fileno()
            except OSError:  # a remote file has none: its bytes are read into memory
                return np.frombuffer(bytearray(file.read()), np.uint8)
            num_bytes = os.fstat(number).st_size
            if num_bytes == 0:
                return np.zeros(0, np.uint8)
            # Python's mmap would keep a descriptor for as long as rows are in use.
            path = f"/dev/fd/{number}"
            return torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8).numpy()

    def create(self, url: str) -> NewFile:
        """Returns a new file to write, which replaces the one at `url` when it is committed.

        Args:
          url: a local path, or an `s3://` or `gs://` address.

        Raises:
          ConfigError: for addresses that are only read.
          ShardUnavailableError: by its `commit`, once all attempts to upload are used up.
        """
        require_writable(url)
        if not addresses.scheme_of(url):
            return NewFile(url, None)

        def _put(path: str) -> None:
            resources = self._resources()
            # All attempts of one small request, twice over, and the body at the slowest speed.
            limit_s = 2 * self._longest_wait_s() + os.path.getsize(path) / SLOWEST_BYTES_PER_S
            driver = resources.driver(url)
            resources.connections.run(resources.fetcher.put, driver, url, path, timeout_s=limit_s)

        return NewFile(url, _put)

    def names_in(self, folder: str) -> list[str]:
        """Returns the names of the files directly in a folder that can be written to, sorted.

        Raises:
          ConfigError: for a store that cannot be listed in this way.
          ShardUnavailableError: if it cannot be reached.
        """
        require_writable(folder)
        if not addresses.scheme_of(folder):
            return list_local(folder)
        resources = self._resources()
        driver = resources.driver(folder)
        found = self._matches(resources, driver, f"{folder}/*")
        return sorted(name.rpartition("/")[2] for name, _ in found)

    def remove_unfinished(self, folder: str) -> None:
        """Removes unfinished files of killed processes in a local folder; a store has none."""
        if not addresses.scheme_of(folder):
            remove_unfinished(folder)

    def take_counts(self) -> dict[str, int]:
        """Returns the counts of this process since the last call.

        `storage_bytes` that arrived, `storage_requests` sent, and `storage_retries` among them;
        with a cache also `cache_hits`, `cache_misses`, `cache_evictions` and `cache_bypasses`.
        """
        resources = self._by_process.get(os.getpid())
        if resources is None:
            return {}
        cached = resources.cache.take_counts() if resources.cache else {}
        return {**resources.fetcher.take_counts(), **cached}

    def close(self) -> None:
        """Closes every remote file and connection of this process. It can be used again."""
        _close_resources(self._by_process)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._by_process = {}

    def __repr__(self) -> str:
        resources = self._by_process.get(os.getpid())
        files, used = (
            (len(resources.files), resources.read_ahead.used_bytes) if resources else (0, 0)
        )
        return f"<Storage {files} remote files open | {used / 2**20:.1f} MiB read ahead>"

    def _resources(self) -> _ProcessResources:
        """Returns the resources of this process; those of a parent are kept, but not touched."""
        # After a fork the dict still holds the parent's, under its process id: dropped, they would
        # close sockets and take locks that the parent uses.
        resources = self._by_process.get(os.getpid())
        if resources is None:
            resources = self._by_process.setdefault(os.getpid(), _ProcessResources(self.config))
            weakref.finalize(self, _close_resources, self._by_process)
        return resources

    def _open_remote(self, url: str, expected: ObjectInfo) -> BinaryIO:
        resources = self._resources()
        file = RemoteFile(
            Window(url, expected),
            resources.read_ahead,
            lambda: resources.driver(url),
            self._longest_wait_s(),
            resources.files.discard,
        )
        resources.files.add(file)
        return io.BufferedReader(file, BUFFER_BYTES)

    def _download(self, url: str, expected: ObjectInfo) -> Generator[bytes, None, None]:
        with self._open_remote(url, expected) as file:
            while chunk := file.read(_DOWNLOAD_BYTES):
                yield chunk

    def _list(self, url: str) -> list[str]:
        """Returns the shards of a remote address: itself, pinned on the Hub, or its matches."""
        is_glob = addresses.is_remote_glob(url)
        if addresses.is_folder(url) and not is_glob:
            raise ConfigError(
                f"source {redacted(url)!r} is a bucket, a folder or a whole repository, not a "
                f"shard; pass a pattern: {redacted(url.rstrip('/')) + '/*.tar'!r}. A repository of "
                "the Hub is read as a whole if it is the only source, not one of a list."
            )
        if not is_glob and addresses.scheme_of(url) != "hf":
            return [url]
        resources = self._resources()
        driver = resources.driver(url)
        url = resources.fetcher.retried(url, lambda: driver.pinned(url))
        if not is_glob:
            return [url]
        found = sorted(self._matches(resources, driver, url))
        if not found:
            raise ConfigError(
                f"source {redacted(url)!r} matches nothing. Check the pattern, and that you may "
                "list the folder; without that, name the shards by braces: {00000..00123}."
            )
        resources.listed.update((name, info) for name, info in found if info is not None)
        return [name for name, _ in found]

    def _matches(
        self, resources: _ProcessResources, driver: Driver, pattern: str
    ) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the objects that match, asked for until that succeeds or is in vain."""
        limit_s = self._longest_wait_s()

        def _once() -> list[tuple[str, ObjectInfo | None]]:
            return resources.connections.run(
                resources.fetcher.matches, driver, pattern, limit_s, timeout_s=2 * limit_s
            )

        return resources.fetcher.retried(pattern, _once)

    def _longest_wait_s(self) -> float:
        """Returns a time that no read can take: all attempts, and one that ends as they do."""
        # By default 8 MiB at 16 KiB/s are 512 s, to which the limits of the configuration come. A
        # longer wait means that fsspec's loop itself does not run.
        config = self.config
        slow_s = MAX_SEGMENT_BYTES / SLOWEST_BYTES_PER_S
        return config.retry_timeout_s + slow_s + config.connect_timeout_s + config.stall_timeout_s


def _make_cache(config: StorageConfig) -> DiskCache | None:
    if config.cache_folder is None:
        return None
    # Another process that downloads may be waiting for its next attempt.
    stall_s = config.retry_timeout_s + config.stall_timeout_s
    return DiskCache(config.cache_folder, limit_bytes=config.cache_bytes, stall_s=stall_s)


def _close_resources(by_process: dict[int, _ProcessResources]) -> None:
    resources = by_process.pop(os.getpid(), None)
    if resources is not None:
        resources.close()
