"""Makes files of remote shards: seekable, and read ahead on fsspec's loop.

In: a window of `ReadAhead`. Out: a raw file. Runs in the thread that reads; holds no lock.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

from jest_stream.errors import StalledError
from jest_stream.storage.read_ahead import ReadAhead, Window
from jest_stream.storage.redaction import redacted


class RemoteFile(io.RawIOBase):
    """Reads one object by range requests; `io.BufferedReader` goes on top.

    Args:
      window: the segments of the object.
      read_ahead: the planner of this process.
      connect: makes the connection, if there is none; called before each read.
      wait_s: longest wait for a byte, longer than all attempts together.
      on_close: called once.
    """

    def __init__(
        self,
        window: Window,
        read_ahead: ReadAhead,
        connect: Callable[[], object],
        wait_s: float,
        on_close: Callable[[RemoteFile], None],
    ) -> None:
        super().__init__()
        self.name = redacted(window.url)
        self._window = window
        self._read_ahead = read_ahead
        self._connect = connect
        self._wait_s = wait_s
        self._on_close = on_close
        self._pid = os.getpid()
        self._position = 0
        read_ahead.open(window)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Returns the position, in bytes."""
        self._check_usable()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves the position; nothing is read before the next read."""
        self._check_usable()
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._window.num_bytes,
        }.get(whence)
        if start is None:
            raise ValueError(f"whence must be 0, 1 or 2, got {whence}")
        if start + offset < 0:
            raise ValueError(f"cannot seek to byte {start + offset}, before the start of the shard")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Reads the bytes that have arrived, at least one before the end; returns how many."""
        self._check_usable()
        out = memoryview(buffer).cast("B")
        if self._position >= self._window.num_bytes or not out:
            return 0
        self._connect()
        num_bytes = self._read_ahead.read_into(self._window, self._position, out, self._wait_s)
        # Not the end, which was looked at above: 0 would tell the reader that the file is over.
        if num_bytes == 0:
            raise StalledError(
                f"shard {self.name!r}, byte {self._position:,}: nothing was heard of a request for "
                f"{self._wait_s:.0f} s although requests have their own limits. Is fsspec's loop "
                "(thread fsspecIO) blocked by something else?"
            )
        self._position += num_bytes
        return num_bytes

    def close(self) -> None:
        """Cancels the requests on their way and frees the bytes held. Twice does no harm."""
        if self.closed:
            return
        super().close()
        if self._pid == os.getpid():  # in a fork, the window and its lock are the parent's
            self._read_ahead.close(self._window)
            self._on_close(self)

    def _check_usable(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._pid != os.getpid():
            raise ValueError(
                f"shard {self.name!r} was opened before this process was forked; connections do "
                "not survive that. Open it in the process that reads it."
            )
