"""Writes files that appear whole or not at all: beside their place first, then moved into it.

In: bytes. Out: a local file, by a rename once the bytes are on disk, or an object, by a put, which
is all or nothing. An unfinished file is removed with its `NewFile` object when a process is
interrupted; after a kill, by the next process, which sees that nobody holds its lock. No threads.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from jest_stream.errors import ConfigError
from jest_stream.storage.addresses import check_address, scheme_of
from jest_stream.storage.redaction import redacted

_UNFINISHED = ".unfinished"
_WRITABLE = ("", "s3", "gs")


def folder_address(url: str | os.PathLike[str]) -> str:
    """Returns the address of a folder in its one form: without a slash at its end.

    Raises:
      ConfigError: for an empty address, or one with a query.
      UnsafeDataError: for an address outside the allow-list.
    """
    address = check_address(os.fspath(url))
    if scheme_of(address) and "?" in address:
        raise ConfigError(
            f"{redacted(address)!r} is an address with a query, which names one file, not a "
            "folder. Pass the folder; credentials go into StorageConfig(options=...)."
        )
    if not address:
        raise ConfigError("the path of a folder is empty; pass a folder or an address.")
    return address.rstrip("/") or "/"


def require_writable(folder: str) -> None:
    """Raises `ConfigError` for a folder that nothing can be written to from here."""
    scheme = scheme_of(folder)
    if scheme not in _WRITABLE:
        raise ConfigError(
            f"cannot write to {redacted(folder)!r}: {scheme}:// is only read. Write to a local "
            "folder, s3:// or gs://, and publish it from there."
        )


class NewFile:
    """A file that is being written: it appears whole with `commit`, or not at all.

    Args:
      url: the local path or address of the finished file.
      put: uploads the local file of a path to that address; None for a local file.

    Raises:
      ConfigError: where the disk does not take it, here and in `write` and `commit`.
    """

    def __init__(self, url: str, put: Callable[[str], None] | None) -> None:
        self._url = url
        self._put = put
        # Not by `tempfile`, for three reasons: 1. its files are for their owner alone (0600), but a
        # cache on a shared disk is read by others. 2. It tells nobody that a file is being written.
        # 3. Its finalizer would remove this process's file from a fork.
        folder, name = (tempfile.gettempdir(), "jest_stream") if put else os.path.split(url)
        self._folder = folder or "."
        unfinished = f".{name}.{secrets.token_hex(8)}{_UNFINISHED}"
        self._path = os.path.join(self._folder, unfinished)
        with self._explained():
            os.makedirs(self._folder, exist_ok=True)
            # Before the file: Ctrl-C can come between any two lines, and the caller's name for
            # this object is not bound yet.
            weakref.finalize(self, _remove, self._path, os.getpid())
            # "x": a name of 64 random bits that exists already is another writer's.
            self._file = open(self._path, "xb")
            # Held until the file is closed or the process ends: others see that it is written.
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, data: bytes) -> int:
        """Writes all of `data`; returns its length."""
        with self._explained():
            return self._file.write(data)

    def commit(self) -> None:
        """Moves the file into its place."""
        try:
            with self._explained():
                self._file.flush()
                # Before the rename: a power cut leaves the former file or this one, never zeros.
                os.fsync(self._file.fileno())
                # Still locked, so that nobody takes it for abandoned before it has its name.
                if self._put is None:
                    os.replace(self._path, self._url)
            if self._put is not None:
                self._put(self._path)
        finally:
            self.abort()
        if self._put is None:
            with self._explained():  # the new name is on disk, too, when this returns
                _sync_folder(self._folder)

    def abort(self) -> None:
        """Closes and removes the file, unless it was moved into its place. Twice does no harm."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            os.unlink(self._path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self._folder if self._put else self._url
            raise ConfigError(
                f"cannot write {redacted(place)!r}: {error.strerror or error}. Make room, or "
                "choose a folder that can be written. Files finished before are whole."
            ) from error


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork of the process that writes
        with suppress(OSError):
            os.unlink(path)


def remove_unfinished(folder: str) -> None:
    """Removes the unfinished files of killed processes in a local folder, not those in work."""
    for name in list_local(folder, hidden=True):
        if not (name.startswith(".") and name.endswith(_UNFINISHED)):
            continue
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        except OSError:
            continue  # being written, or gone already


def list_local(folder: str, *, hidden: bool = False) -> list[str]:
    """Returns the names in a local folder, sorted; none if it does not exist."""
    try:
        return sorted(name for name in os.listdir(folder) if hidden or not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"{folder!r} cannot be used as a folder: {error.strerror or error}."
        ) from error


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
