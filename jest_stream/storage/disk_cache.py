"""A bounded cache of whole shards on local disk, shared by any number of processes.

In: the address, length and version of a shard, and a function that downloads it. Out: an open local
file. Each entry is one file that is named by a hash and appears in one step, whole; an unfinished
download is another file, locked by who writes it. All state is in the folder and in `flock` locks,
which end with the process that holds them, so that nothing is left to be cleared up after a crash.
No threads.

Locks: an entry is locked shared by who reads it, so that it is not evicted meanwhile; an unfinished
download exclusively, by the one process that downloads; `folder.lock` exclusively, for the moment
in which files come or go.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import BinaryIO, NamedTuple

from jest_stream.errors import ConfigError, ShardChangedError, StalledError
from jest_stream.storage.redaction import redacted

_ENTRY = re.compile(r"[0-9a-f]{32}\.shard")
_PART = re.compile(r"[0-9a-f]{32}\.(\d+)\.part")
_BUFFER_BYTES = 256 * 1024
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class _Part(NamedTuple):
    """A download that this process has begun and locked."""

    path: str
    descriptor: int


class DiskCache:
    """Keeps the shards used last in a folder, up to a number of bytes.

    Other processes may use the same folder at the same time: they download each shard once between
    them. Holds no descriptor between calls, so that it may be inherited by any process.

    Args:
      folder: where the shards lie; made if it is not there. Other files in it are left alone.
      limit_bytes: most bytes of all entries and unfinished downloads together.
      stall_s: how long to wait for another process's download that does not grow.

    Raises:
      ConfigError: if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit_bytes: int, stall_s: float) -> None:
        self._folder = os.path.abspath(os.path.expanduser(folder))
        self._limit_bytes = limit_bytes
        self._stall_s = stall_s
        self._counts: Counter[str] = Counter()
        with self._explained(""):
            os.makedirs(self._folder, exist_ok=True)
            with self._locked_folder():
                self._remove_abandoned()

    def check_fits(self, url: str, num_bytes: int) -> None:
        """Demands that a shard of this length can be cached at all.

        Raises:
          ConfigError: if it is larger than the whole cache may be.
        """
        if num_bytes > self._limit_bytes:
            raise ConfigError(
                f"cache_bytes={self._limit_bytes:,} is less than one shard: {redacted(url)!r} has "
                f"{num_bytes:,} bytes. Raise cache_bytes to several shards per worker, or leave "
                "cache_folder out."
            )

    def open(
        self,
        url: str,
        num_bytes: int,
        version: str,
        download: Callable[[], Generator[bytes, None, None]],
    ) -> BinaryIO | None:
        """Returns the shard as a local file, downloaded at most once; None if it cannot be kept.

        There is no room when the shards that are being read fill the cache; and what has no version
        cannot be told from what it was before. Read without the cache then. The file is locked
        until it is closed.

        Args:
          url: address of the shard; with `num_bytes` and `version` it names the entry.
          num_bytes: length of the shard.
          version: names its content, such as an ETag; "" if nothing does.
          download: yields the bytes of the shard, in order; called if it is not cached. Its
            exceptions are raised here, and leave nothing behind.

        Raises:
          ConfigError: if the shard is larger than the cache, or the folder cannot be written.
          ShardChangedError: if the download has another length.
          StalledError: if another process's download does not go on.
        """
        self.check_fits(url, num_bytes)
        if not version:
            self._counts["cache_bypasses"] += 1
            return None
        name = hashlib.blake2b(f"{url}\0{version}\0{num_bytes}".encode(), digest_size=16)
        entry = os.path.join(self._folder, f"{name.hexdigest()}.shard")
        part = os.path.join(self._folder, f"{name.hexdigest()}.{num_bytes}.part")
        progress, since = -1, time.monotonic()
        while True:
            with self._explained(url):
                file = self._open_entry(entry, num_bytes)
                if file is not None:
                    self._counts["cache_hits"] += 1
                    return file
                claimed = self._claim(part, entry)
            if claimed is None:
                self._counts["cache_bypasses"] += 1
                return None
            if isinstance(claimed, _Part):
                self._counts["cache_misses"] += 1
                return self._fill(claimed, entry, url, num_bytes, download)
            if claimed != progress:
                progress, since = claimed, time.monotonic()
            elif time.monotonic() - since > self._stall_s:
                raise StalledError(
                    f"another process is downloading shard {redacted(url)!r} into "
                    f"{self._folder!r}, and has written nothing for {self._stall_s:g} s "
                    f"({progress:,} of {num_bytes:,} bytes). It holds a lock on {part!r}: stop it."
                )
            time.sleep(0.02)  # flock cannot be waited for with a time limit

    def take_counts(self) -> dict[str, int]:
        """Returns what was counted since the last call: hits, misses, evictions, bypasses."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def _open_entry(self, path: str, num_bytes: int) -> BinaryIO | None:
        """Returns an entry, locked against eviction; None if it is not there or not whole."""
        try:
            descriptor = os.open(path, _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        try:
            # Only who evicts or finishes it locks it exclusively, for a moment.
            self._lock(descriptor, fcntl.LOCK_SH, path)
            status = os.fstat(descriptor)
            if status.st_nlink and status.st_size == num_bytes:
                os.utime(descriptor)  # used now: evicted last
                return os.fdopen(descriptor, "rb", buffering=_BUFFER_BYTES)
            if status.st_nlink:  # cut by somebody else's hand
                os.unlink(path)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _claim(self, path: str, entry: str) -> _Part | int | None:
        """Begins a download; returns how far it is if another process does it, None for no room."""
        with self._locked_folder():
            if os.path.exists(entry):  # finished by another process a moment ago
                return 0
            descriptor = os.open(path, _OPEN_FLAGS | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                written = os.fstat(descriptor).st_size
                os.close(descriptor)
                return written
            try:
                given_up = os.fstat(descriptor).st_nlink == 0  # by its process, just now
                if not given_up:
                    os.ftruncate(descriptor, 0)  # what a crash has left
                    if self._make_room(os.path.basename(path)):
                        return _Part(path, descriptor)
                    os.unlink(path)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            return 0 if given_up else None

    def _fill(
        self,
        part: _Part,
        entry: str,
        url: str,
        num_bytes: int,
        download: Callable[[], Generator[bytes, None, None]],
    ) -> BinaryIO:
        """Downloads into a part, makes it an entry, and returns it."""
        try:
            written = 0
            with closing(download()) as chunks:
                for chunk in chunks:
                    with self._explained(url):
                        _write_all(part.descriptor, chunk)
                    written += len(chunk)
                    if written > num_bytes:
                        break
            if written != num_bytes:
                raise ShardChangedError(
                    f"shard {redacted(url)!r} was to have {num_bytes:,} bytes; its download gave "
                    f"{written:,}{' and more' if written > num_bytes else ''}. It has changed; "
                    "start again, so that its new content is read from the beginning.",
                    shard=redacted(url),
                    offset=min(written, num_bytes),
                )
            with self._explained(url):
                os.fsync(part.descriptor)
                with self._locked_folder():
                    os.rename(part.path, entry)
                    # Not atomic, but nobody evicts while the folder is locked.
                    fcntl.flock(part.descriptor, fcntl.LOCK_SH)
                self._sync_folder()
                os.lseek(part.descriptor, 0, os.SEEK_SET)
        except BaseException:
            _unlink_if_there(part.path)
            os.close(part.descriptor)
            raise
        return os.fdopen(part.descriptor, "rb", buffering=_BUFFER_BYTES)

    def _make_room(self, new_part: str) -> bool:
        """Evicts what was used longest ago until all fits; tells whether it does.

        The folder is locked. Sizes of unfinished downloads are those they will have.
        """
        self._remove_abandoned(but=new_part)
        total, entries = 0, []
        with os.scandir(self._folder) as items:
            for item in items:
                if found := _PART.fullmatch(item.name):
                    total += int(found.group(1))
                elif _ENTRY.fullmatch(item.name):
                    status = item.stat(follow_symlinks=False)
                    total += status.st_size
                    entries.append((status.st_mtime_ns, status.st_size, item.path))
        for _, size, path in sorted(entries):
            if total <= self._limit_bytes:
                break
            if self._remove_unlocked(path):
                self._counts["cache_evictions"] += 1
                total -= size
        return total <= self._limit_bytes

    def _remove_abandoned(self, but: str = "") -> None:
        """Removes downloads whose process has ended. The folder is locked."""
        for name in os.listdir(self._folder):
            if _PART.fullmatch(name) and name != but:
                self._remove_unlocked(os.path.join(self._folder, name))

    def _remove_unlocked(self, path: str) -> bool:
        """Removes a file unless some process has locked it; tells whether it did."""
        try:
            descriptor = os.open(path, _OPEN_FLAGS)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        finally:
            os.close(descriptor)
        return True

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Holds the lock under which files come and go; held for moments only."""
        path = os.path.join(self._folder, "folder.lock")
        descriptor = os.open(path, _OPEN_FLAGS | os.O_CREAT, 0o644)
        try:
            self._lock(descriptor, fcntl.LOCK_EX, path)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, kind: int, path: str) -> None:
        """Waits for a lock that others hold for moments only."""
        deadline = time.monotonic() + self._stall_s
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StalledError(
                        f"another process has held the lock on {path!r} for {self._stall_s:g} s; "
                        "it is held for moments only. Has it been suspended? Stop it."
                    ) from None
            time.sleep(0.002)  # flock cannot be waited for with a time limit

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _explained(self, url: str) -> Iterator[None]:
        """Turns what the disk refuses into an error that names the folder and what to do."""
        try:
            yield
        except OSError as error:
            what = f"cannot take shard {redacted(url)!r}" if url else "cannot be used"
            fix = "choose a folder on local disk that can be written, or leave cache_folder out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = shutil.disk_usage(self._folder).free
                fix = (
                    f"{free:,} bytes are free there, cache_bytes is {self._limit_bytes:,}: free "
                    "some, lower cache_bytes, or choose another folder"
                )
            raise ConfigError(
                f"cache_folder={self._folder!r} {what}: {error.strerror or error}. "
                f"To fix it, {fix}."
            ) from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _unlink_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
