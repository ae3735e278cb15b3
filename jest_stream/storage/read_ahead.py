"""Plans the bytes of all open remote files that are held or on their way, within one budget.

In: positions of readers. Out: bytes, and segments to request. Every file has a window: segments,
each read by a range request, from its reader's position onwards. Windows grow while a file is read
in order, and share the budget evenly: with 64 files open on 256 MiB, each has 4 MiB in segments of
2 MiB.
This module knows no network: `fetch` starts a request.

Readers call from any thread, bytes arrive on fsspec's loop; both hold the one lock for as long as
it takes to copy them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from jest_stream.types import ObjectInfo

MAX_WINDOW_BYTES = 32 << 20
MAX_SEGMENT_BYTES = 8 << 20
_FIRST_WINDOW_BYTES = 4 << 20  # of a file that has not been read in order yet
_FIRST_SEGMENT_BYTES = 1 << 20  # small: a reader waits for its first byte
_LEAST_SEGMENT_BYTES = 64 << 10  # even beyond the budget, for a reader that waits

# Requests under way at once, apart from those that a reader waits for.
_MAX_RUNNING = 32


class Segment:
    """Bytes of a file that are asked for together, again for the rest where a request fails."""

    def __init__(self, window: Window, start: int, num_bytes: int) -> None:
        self.window = window
        self.start = start
        self.end = start + num_bytes
        self.data = bytearray()  # its full size from the moment it is asked for
        self.filled = 0
        self.error: BaseException | None = None
        self.future: Future[None] | None = None
        self.is_dropped = False

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes of the budget, from the moment it is planned."""
        return self.end - self.start

    def num_ready(self, position: int) -> int:
        """Returns how many bytes have arrived from `position` on."""
        return max(0, self.start + self.filled - position)


class Window:
    """Holds the segments of one open file, in order, without overlaps."""

    def __init__(self, url: str, expected: ObjectInfo) -> None:
        self.url = url
        self.expected = expected
        self.num_bytes = expected.num_bytes
        self.segments: list[Segment] = []
        self.target_bytes = _FIRST_WINDOW_BYTES
        self.current: Segment | None = None  # the segment that the reader is in
        self.awaited: Segment | None = None  # the segment that a reader waits for

    @property
    def used_bytes(self) -> int:
        """The share of the budget that its segments take."""
        return sum(segment.num_bytes for segment in self.segments)

    def at(self, position: int) -> Segment | None:
        """Returns the segment that holds a position."""
        for segment in self.segments:
            if segment.start <= position < segment.end:
                return segment
        return None

    def free_until(self, position: int) -> int:
        """Returns the start of the next segment after `position`, or the end of the file."""
        starts = [segment.start for segment in self.segments if segment.start > position]
        return min(starts, default=self.num_bytes)

    def add(self, start: int, num_bytes: int) -> Segment:
        """Returns a new segment, kept in order."""
        segment = Segment(self, start, num_bytes)
        self.segments.append(segment)
        self.segments.sort(key=lambda each: each.start)
        return segment


class ReadAhead:
    """Shares a budget of bytes among the windows of all open files.

    Args:
      limit_bytes: the budget. Only segments that readers wait for may exceed it, by 64 KiB for each
        file.
      fetch: starts the requests for a segment; they call `fill` and `finish`.
    """

    def __init__(self, limit_bytes: int, fetch: Callable[[Segment], Future[None]]) -> None:
        self._limit_bytes = limit_bytes
        self._fetch = fetch
        # Guards everything below but `_closing`, and the windows with their segments.
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._windows: set[Window] = set()
        self._used_bytes = 0
        self._running: set[Segment] = set()
        self._queue: deque[Segment] = deque()
        self._holder = 0  # the thread that holds the lock
        self._closing: deque[Window] = deque()  # appended to without the lock

    @property
    def used_bytes(self) -> int:
        """Bytes that are held or on their way."""
        return self._used_bytes

    def open(self, window: Window) -> None:
        """Gives a file a share; the others' become smaller."""
        with self._locked():
            self._windows.add(window)

    def close(self, window: Window) -> None:
        """Cancels the requests of a file and frees its bytes.

        May be called by the garbage collector at any moment, in a thread that holds the lock: then
        it is done when the lock is given back.
        """
        self._closing.append(window)
        if self._holder != threading.get_ident():
            with self._locked():
                pass

    def read_into(self, window: Window, position: int, out: memoryview, wait_s: float) -> int:
        """Copies bytes from `position` on; waits until there is at least one.

        Returns:
          How many were copied, at most `len(out)`; 0 if none arrived within `wait_s`.

        Raises:
          ShardError: if they cannot be read. The next call tries again.
          ValueError: if the file was closed meanwhile.
        """
        with self._locked():
            while True:
                if window not in self._windows:
                    raise ValueError("I/O operation on closed file")
                # There are four cases:
                # 1. No segment holds the position, or a reader's earlier one: ask, and plan ahead.
                segment = window.current
                if (
                    segment is None
                    or not segment.start <= position < segment.end
                    or segment.is_dropped
                ):
                    segment = self._demand(window, position)
                # 2. Some bytes have arrived.
                if num_ready := min(segment.num_ready(position), len(out)):
                    first = position - segment.start
                    out[:num_ready] = memoryview(segment.data)[first : first + num_ready]
                    return num_ready
                # 3. Its requests have failed: the next call asks anew.
                if segment.error is not None:
                    self._drop(segment)
                    try:
                        raise segment.error
                    finally:
                        segment.error = (
                            None  # its traceback holds this frame, which holds the segment
                        )
                # 4. Nothing yet.
                if not self._wait_for(segment, wait_s):
                    return 0

    def fill(self, segment: Segment, data: bytes) -> bool:
        """Adds bytes that arrived; returns whether more are wanted."""
        with self._locked():
            if segment.is_dropped:
                return False
            segment.data[segment.filled : segment.filled + len(data)] = data
            segment.filled += len(data)
            # Most bytes that arrive are for later: only a reader that waits for them is woken.
            if segment.window.awaited is segment:
                self._arrived.notify_all()
            return True

    def finish(self, segment: Segment, error: BaseException | None) -> None:
        """Notes the end of the requests for a segment; with `error`, that they failed."""
        with self._locked():
            if segment.is_dropped:
                return
            self._running.discard(segment)
            segment.error = error
            if error is not None and segment.window.awaited is not segment:
                self._drop(segment)  # nobody waits: it is asked for again when a reader comes to it
            self._arrived.notify_all()
            self._start_queued()

    def stop(self) -> None:
        """Cancels every request. Readers that wait ask again."""
        with self._locked():
            for segment in [*self._running, *self._queue]:
                self._drop(segment)
            self._arrived.notify_all()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The garbage collector may close a file between any two lines, also in the thread that
        # holds the lock: it would wait for itself for ever. So `close` only notes the window, and
        # the thread that holds the lock closes all noted windows before it gives the lock back.
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                while self._closing:
                    self._close_now(self._closing.popleft())
                self._holder = 0

    def _wait_for(self, segment: Segment, wait_s: float) -> bool:
        """Gives the lock back until something has arrived; returns whether it has."""
        segment.window.awaited = segment
        self._holder = 0  # while it waits, this thread does not hold the lock
        try:
            return self._arrived.wait(wait_s)
        finally:
            self._holder = threading.get_ident()
            segment.window.awaited = None

    def _close_now(self, window: Window) -> None:
        self._windows.discard(window)
        for segment in list(window.segments):
            self._drop(segment)
        window.current = None
        self._arrived.notify_all()
        self._start_queued()

    def _demand(self, window: Window, position: int) -> Segment:
        """Returns the segment that a reader needs now, asked for; plans the segments after it."""
        segment = window.at(position)
        before = window.current
        # There are three cases:
        # 1. The reader goes on in order: its window doubles, from 4 MiB up to 32.
        # 2. It has jumped to bytes that nobody asked for: the window begins small again.
        # 3. It has jumped within its window, or has just begun: nothing changes.
        if before is not None and position == before.end:
            window.target_bytes = min(2 * window.target_bytes, MAX_WINDOW_BYTES)
        elif before is not None and segment is None:
            window.target_bytes = _FIRST_WINDOW_BYTES
        if segment is None:
            room = window.free_until(position) - position
            size = min(self._segment_bytes(), room)
            if window.target_bytes == _FIRST_WINDOW_BYTES:
                size = min(size, _FIRST_SEGMENT_BYTES)  # its first byte is waited for
            size = self._make_room(window, position, size)
            segment = window.add(position, size)
            self._used_bytes += size
        window.current = segment
        if segment.future is None:
            self._start(segment)
        self._plan(window, position)
        return segment

    def _plan(self, window: Window, position: int) -> None:
        """Asks for segments ahead of the reader, as far as its share goes.

        The segment that the reader is in counts whole: with a share of 4 MiB and segments of 2 MiB,
        a reader in segment 0-2 has 2-4 asked for, and then the share is used up. A rest below a
        quarter of a segment is left for later, except at the end of the file: each request costs a
        round trip.
        """
        share, size = self._share(), self._segment_bytes()
        target = min(share, window.target_bytes)
        cursor = window.current.end if window.current else position
        while cursor < window.num_bytes:
            # A segment that a jump has left there: go on after it.
            if existing := window.at(cursor):
                cursor = existing.end
                continue
            ahead = sum(segment.num_bytes for segment in window.segments if segment.end > position)
            wanted = min(size, window.free_until(cursor) - cursor, target - ahead)
            if wanted < size // 4 and cursor + wanted < window.num_bytes:
                break
            # Bytes that were read make room first, the earliest before the others.
            for segment in [each for each in window.segments if each.end <= position]:
                if window.used_bytes + wanted <= share and self._fits(wanted):
                    break
                self._drop(segment)
            if window.used_bytes + wanted > share or not self._fits(wanted):
                break
            segment = window.add(cursor, wanted)
            self._used_bytes += segment.num_bytes
            self._queue.append(segment)
            cursor = segment.end
        self._start_queued()

    def _make_room(self, window: Window, position: int, wanted: int) -> int:
        """Returns how many of the bytes wanted fit, after dropping the segments needed least.

        In this order: 1. Segments that this reader has passed. 2. The last segment of the file that
        holds most, while that is more than its share. 3. The last segment of this file. A reader
        that waits always gets 64 KiB, even beyond the budget: else it would wait for ever.
        """
        for segment in [each for each in window.segments if each.end <= position]:
            if self._fits(wanted):
                return wanted
            self._drop(segment)
        while not self._fits(wanted):
            others = [each for each in self._windows if each is not window]
            richest = max(others, key=lambda each: each.used_bytes, default=window)
            if richest.used_bytes <= self._share():
                richest = window
            if not richest.segments:
                break
            self._drop(richest.segments[-1])
        free = self._limit_bytes - self._used_bytes
        return min(wanted, max(free, _LEAST_SEGMENT_BYTES))

    def _fits(self, num_bytes: int) -> bool:
        return self._used_bytes + num_bytes <= self._limit_bytes

    def _share(self) -> int:
        # 256 MiB and 64 open files: 4 MiB each. One file alone: 32 MiB, the largest window.
        return min(MAX_WINDOW_BYTES, self._limit_bytes // max(1, len(self._windows)))

    def _segment_bytes(self) -> int:
        # Half a share, so that one segment arrives while the other is read.
        return max(_LEAST_SEGMENT_BYTES, min(MAX_SEGMENT_BYTES, self._share() // 2))

    def _start_queued(self) -> None:
        while self._queue and len(self._running) < _MAX_RUNNING:
            segment = self._queue.popleft()
            # It may have been dropped, or started since a reader came to it.
            if not segment.is_dropped and segment.future is None:
                self._start(segment)

    def _start(self, segment: Segment) -> None:
        segment.data = bytearray(segment.num_bytes)
        self._running.add(segment)
        segment.future = self._fetch(segment)

    def _drop(self, segment: Segment) -> None:
        """Frees a segment and cancels its requests; a reader that waits for it asks again."""
        if segment.is_dropped:
            return
        segment.is_dropped = True
        segment.window.segments.remove(segment)
        if segment.window.current is segment:
            segment.window.current = None
        self._used_bytes -= segment.num_bytes
        self._running.discard(segment)
        segment.data = bytearray()
        if segment.future is not None:
            segment.future.cancel()
        if segment.window.awaited is segment:
            self._arrived.notify_all()
