"""Caches whole shards on local disk, up to a limit, for any number of processes.

In: the address, length and version of a shard, and a function that downloads it. Out: an open local
file. An entry is one file that is named by a hash and appears in one step, whole; an unfinished
download is another file (`.part`). All state is in the folder and in `flock` locks, which end with
the process that holds them: a crash leaves nothing to clear up. Runs in the thread that calls.

There are three locks:
1. `folder.lock` (exclusive, for moments): files come, go and are locked only while it is held.
2. An unfinished download (exclusive, while it lasts): the one process that downloads.
3. An entry (shared, while its file is open): the processes that read it; it is not evicted.
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
from contextlib import closing, contextmanager, suppress
from typing import BinaryIO

import filelock

from jest_stream.errors import ConfigError, ShardChangedError, StalledError
from jest_stream.storage.redaction import redacted

_ENTRY = re.compile(r"[0-9a-f]{32}\.shard")
_PART = re.compile(r"[0-9a-f]{32}\.(\d+)\.part")
_BUFFER_BYTES = 256 * 1024
# A name in a shared folder may be another user's link to a file elsewhere: links are refused.
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_DOWNLOAD_POLL_S = 0.02
_FOLDER_POLL_S = 0.002  # that lock is held for moments only

Download = Callable[[], Generator[bytes, None, None]]


class DiskCache:
    """Keeps the shards used last in a folder, up to a number of bytes.

    Other processes may use the same folder at the same time: they download each shard once between
    them. Holds no descriptor between calls, so any process may inherit it.

    Args:
      folder: where the shards lie; made if missing. Other files in it are left alone.
      limit_bytes: most bytes of all entries and unfinished downloads together.
      stall_s: longest wait for another process's download that does not grow.

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
        """Raises `ConfigError` for a shard that is larger than the whole cache may be."""
        if num_bytes > self._limit_bytes:
            raise ConfigError(
                f"cache_bytes={self._limit_bytes:,} is less than one shard: {redacted(url)!r} has "
                f"{num_bytes:,} bytes. Raise cache_bytes to several shards per worker, or leave "
                "cache_folder out."
            )

    def open(self, url: str, num_bytes: int, version: str, download: Download) -> BinaryIO | None:
        """Returns the shard as a local file, downloaded at most once; None if it cannot be kept.

        It cannot be kept if the shards that are being read fill the cache, or if it has no version:
        a change would go unnoticed. The file is locked until it is closed.

        Args:
          url: address of the shard; with `num_bytes` and `version` it names the entry.
          num_bytes: length of the shard.
          version: names its content, such as an ETag; "" if unknown.
          download: yields the bytes of the shard, in order; called if it is not cached. Its
            exceptions are raised here, and leave nothing.

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
        num_written, since = -1, time.monotonic()
        while True:
            with self._explained(url), self._locked_folder():
                # There are four cases:
                # 1. The entry is whole: it is read.
                if (file := _open_entry(entry, num_bytes)) is not None:
                    self._counts["cache_hits"] += 1
                    return file
                # 2. Another process, or another thread of this one, downloads it: wait.
                descriptor = _open_locked(part, os.O_CREAT)
                if descriptor is None:
                    found = os.stat(part).st_size
                # 3. The entries that are being read fill the cache: read without it.
                elif not self._has_room_for(part, descriptor):
                    self._counts["cache_bypasses"] += 1
                    return None
            # 4. The download is ours. It begins anew: the bytes that a crash left are cut off.
            if descriptor is not None:
                self._counts["cache_misses"] += 1
                return self._fill(descriptor, part, entry, url, num_bytes, download)
            if found != num_written:
                num_written, since = found, time.monotonic()
            elif time.monotonic() - since > self._stall_s:
                raise StalledError(
                    f"another process is downloading shard {redacted(url)!r} into "
                    f"{self._folder!r}, and has written nothing for {self._stall_s:g} s "
                    f"({num_written:,} of {num_bytes:,} bytes). It holds a lock on {part!r}: stop "
                    "it."
                )
            time.sleep(_DOWNLOAD_POLL_S)  # flock cannot be waited for with a time limit

    def take_counts(self) -> dict[str, int]:
        """Returns the hits, misses, evictions and bypasses since the last call."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def _has_room_for(self, part: str, descriptor: int) -> bool:
        """Empties a locked download and evicts until it fits; else removes it and closes it."""
        try:
            os.ftruncate(descriptor, 0)
            if self._make_room(os.path.basename(part)):
                return True
            os.unlink(part)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return False

    def _fill(
        self, descriptor: int, part: str, entry: str, url: str, num_bytes: int, download: Download
    ) -> BinaryIO:
        """Downloads into a part that this process has locked, makes it an entry, and returns it."""
        try:
            num_written = 0
            with closing(download()) as chunks:
                for chunk in chunks:
                    with self._explained(url):
                        _write_all(descriptor, chunk)
                    num_written += len(chunk)
                    if num_written > num_bytes:
                        break
            if num_written != num_bytes:
                raise ShardChangedError(
                    f"shard {redacted(url)!r} was to have {num_bytes:,} bytes; its download gave "
                    f"{num_written:,}{' and more' if num_written > num_bytes else ''}. It has "
                    "changed; start again, so that its new content is read from the beginning.",
                    shard=redacted(url),
                    offset=min(num_written, num_bytes),
                )
            with self._explained(url):
                # Before it is renamed: a power cut leaves no entry of the right length and zeros.
                os.fsync(descriptor)
                with self._locked_folder():
                    os.rename(part, entry)
                    # Not atomic, but nobody evicts while the folder is locked.
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.lseek(descriptor, 0, os.SEEK_SET)
        except BaseException:  # Ctrl-C too: the lock must not outlive this call
            try:
                with suppress(OSError, StalledError), self._locked_folder():
                    os.unlink(part)
            finally:
                os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb", buffering=_BUFFER_BYTES)

    def _make_room(self, new_part: str) -> bool:
        """Evicts the entries used longest ago until all fits; returns whether it does.

        The folder is locked. An unfinished download counts with the length that it will have, which
        its name tells: two of 6 GB never begin side by side in a cache of 10 GB.
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
        # An entry that is being read is locked, and stays; the next ones are tried then.
        for _, size, path in sorted(entries):
            if total <= self._limit_bytes:
                break
            if _remove_unlocked(path):
                self._counts["cache_evictions"] += 1
                total -= size
        return total <= self._limit_bytes

    def _remove_abandoned(self, but: str = "") -> None:
        """Removes downloads whose process has ended. The folder is locked."""
        for name in os.listdir(self._folder):
            if _PART.fullmatch(name) and name != but:
                _remove_unlocked(os.path.join(self._folder, name))

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Holds the lock under which files come, go and are locked; held for moments only."""
        path = os.path.join(self._folder, "folder.lock")
        # The other two locks are plain flock: readers share that of an entry, which filelock's lock
        # cannot do, and it would put a lock file beside each entry.
        lock = filelock.FileLock(path, timeout=self._stall_s)
        try:
            lock.acquire(poll_interval=_FOLDER_POLL_S)
        except filelock.Timeout:
            raise StalledError(
                f"another process has held the lock on {path!r} for {self._stall_s:g} s; "
                "it is held for moments only. Has it been suspended? Stop it."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _explained(self, url: str) -> Iterator[None]:
        """Turns an error of the disk into one that names the folder and the remedy."""
        try:
            yield
        except OSError as error:
            problem = f"cannot take shard {redacted(url)!r}" if url else "cannot be used"
            fix = "choose a folder on local disk that can be written, or leave cache_folder out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = shutil.disk_usage(self._folder).free
                fix = (
                    f"{free:,} bytes are free there, cache_bytes is {self._limit_bytes:,}: free "
                    "some, lower cache_bytes, or choose another folder"
                )
            raise ConfigError(
                f"cache_folder={self._folder!r} {problem}: {error.strerror or error}. "
                f"To fix it, {fix}."
            ) from error


def _open_entry(path: str, num_bytes: int) -> BinaryIO | None:
    """Returns an entry, locked against eviction; None if it is missing or was cut by hand.

    The folder is locked, so no process holds the entry exclusively.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_size == num_bytes:
            os.utime(descriptor)  # used now: evicted last
            return os.fdopen(descriptor, "rb", buffering=_BUFFER_BYTES)
        os.unlink(path)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open_locked(path: str, flags: int = 0) -> int | None:
    """Returns a descriptor of a file, locked exclusively; None if another one holds a lock."""
    descriptor = os.open(path, _OPEN_FLAGS | flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _remove_unlocked(path: str) -> bool:
    """Removes a file unless a process has locked it; returns whether it is gone."""
    try:
        descriptor = _open_locked(path)
        if descriptor is None:
            return False
        try:
            os.unlink(path)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        pass
    return True


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
