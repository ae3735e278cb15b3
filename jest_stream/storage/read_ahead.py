"""Plans the bytes of all open remote files that are held or on their way, within one budget.

In: positions of readers. Out: bytes, and blocks to request. Every file has a window: blocks that
are read by range requests, from its reader's position onwards. Windows grow while a file is read in
order, and share the budget evenly: with 64 files open on 256 MiB, each has 4 MiB in blocks of 2.
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

MAX_WINDOW_BYTES = 32 << 20
MAX_BLOCK_BYTES = 8 << 20
_FIRST_WINDOW_BYTES = 4 << 20  # of a file that has not been read in order yet
_FIRST_BLOCK_BYTES = 1 << 20
_LEAST_BLOCK_BYTES = 64 << 10

# Requests under way at once, apart from those that a reader waits for.
_MAX_RUNNING = 32


class Block:
    """Bytes of a file that one request asks for, and further ones where it fails."""

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
        """Its share of the budget, from the moment it is planned."""
        return self.end - self.start

    def num_ready(self, position: int) -> int:
        """Returns how many bytes have arrived from `position` on."""
        return max(0, self.start + self.filled - position)


class Window:
    """The blocks of one open file, in order, without overlaps."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self.url = url
        self.num_bytes = num_bytes
        self.blocks: list[Block] = []
        self.target_bytes = _FIRST_WINDOW_BYTES
        self.current: Block | None = None  # that the reader is in
        self.awaited: Block | None = None  # that a reader waits for

    @property
    def used_bytes(self) -> int:
        """The share of the budget that its blocks take."""
        return sum(block.num_bytes for block in self.blocks)

    def at(self, position: int) -> Block | None:
        """Returns the block that holds a position."""
        for block in self.blocks:
            if block.start <= position < block.end:
                return block
        return None

    def free_until(self, position: int) -> int:
        """Returns the start of the next block after `position`, or the end of the file."""
        starts = [block.start for block in self.blocks if block.start > position]
        return min(starts, default=self.num_bytes)

    def add(self, start: int, num_bytes: int) -> Block:
        """Returns a new block, kept in order."""
        block = Block(self, start, num_bytes)
        self.blocks.append(block)
        self.blocks.sort(key=lambda each: each.start)
        return block


class ReadAhead:
    """Shares a budget of bytes among the windows of all open files.

    Args:
      limit_bytes: the budget. Only blocks that readers wait for may exceed it, by 64 KiB for each
        file.
      fetch: starts the requests for a block; they call `fill` and `finish`.
    """

    def __init__(self, limit_bytes: int, fetch: Callable[[Block], Future[None]]) -> None:
        self._limit_bytes = limit_bytes
        self._fetch = fetch
        # Guards everything below but `_closing`, and the windows with their blocks.
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._windows: set[Window] = set()
        self._used_bytes = 0
        self._running: set[Block] = set()
        self._queue: deque[Block] = deque()
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
                # 1. No block holds the position, or a reader's earlier one: ask, and plan ahead.
                block = window.current
                if block is None or not block.start <= position < block.end or block.is_dropped:
                    block = self._demand(window, position)
                # 2. Some bytes have arrived.
                if num_ready := min(block.num_ready(position), len(out)):
                    first = position - block.start
                    out[:num_ready] = memoryview(block.data)[first : first + num_ready]
                    return num_ready
                # 3. Its requests have failed: the next call asks anew.
                if block.error is not None:
                    self._drop(block)
                    try:
                        raise block.error
                    finally:
                        block.error = None  # its traceback holds this frame, which holds the block
                # 4. Nothing yet.
                if not self._wait_for(block, wait_s):
                    return 0

    def fill(self, block: Block, data: bytes) -> bool:
        """Adds bytes that arrived; returns whether more are wanted."""
        with self._locked():
            if block.is_dropped:
                return False
            block.data[block.filled : block.filled + len(data)] = data
            block.filled += len(data)
            if block.window.awaited is block:
                self._arrived.notify_all()
            return True

    def finish(self, block: Block, error: BaseException | None) -> None:
        """Notes the end of the requests for a block; with `error`, that they failed."""
        with self._locked():
            if block.is_dropped:
                return
            self._running.discard(block)
            block.error = error
            if error is not None and block.window.awaited is not block:
                self._drop(block)  # nobody waits: it is asked for again when a reader comes to it
            self._arrived.notify_all()
            self._start_queued()

    def stop(self) -> None:
        """Cancels every request. Readers that wait ask again."""
        with self._locked():
            for block in [*self._running, *self._queue]:
                self._drop(block)
            self._arrived.notify_all()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                while self._closing:
                    self._close_now(self._closing.popleft())
                self._holder = 0

    def _wait_for(self, block: Block, wait_s: float) -> bool:
        """Gives the lock back until something has arrived; returns whether it has."""
        block.window.awaited = block
        self._holder = 0
        try:
            return self._arrived.wait(wait_s)
        finally:
            self._holder = threading.get_ident()
            block.window.awaited = None

    def _close_now(self, window: Window) -> None:
        self._windows.discard(window)
        for block in list(window.blocks):
            self._drop(block)
        window.current = None
        self._arrived.notify_all()
        self._start_queued()

    def _demand(self, window: Window, position: int) -> Block:
        """Returns the block that a reader needs now, asked for; plans the blocks after it."""
        block = window.at(position)
        before = window.current
        # There are three cases:
        # 1. The reader goes on in order: its window doubles, from 4 MiB up to 32.
        # 2. It has jumped to bytes that nobody asked for: the window begins small again.
        # 3. It has jumped within its window, or has just begun: nothing changes.
        if before is not None and position == before.end:
            window.target_bytes = min(2 * window.target_bytes, MAX_WINDOW_BYTES)
        elif before is not None and block is None:
            window.target_bytes = _FIRST_WINDOW_BYTES
        if block is None:
            room = window.free_until(position) - position
            size = min(self._block_bytes(), room)
            if window.target_bytes == _FIRST_WINDOW_BYTES:
                size = min(size, _FIRST_BLOCK_BYTES)  # its first byte is waited for
            size = self._make_room(window, position, size)
            block = window.add(position, size)
            self._used_bytes += size
        window.current = block
        if block.future is None:
            self._start(block)
        self._plan(window, position)
        return block

    def _plan(self, window: Window, position: int) -> None:
        """Asks for blocks ahead of the reader, as far as its share goes.

        The block that the reader is in counts whole: with a share of 4 MiB and blocks of 2 MiB, a
        reader in block 0-2 has 2-4 asked for, and then the share is used up. A rest below a quarter
        of a block is left for later, except at the end of the file: each request costs a round
        trip.
        """
        share, size = self._share(), self._block_bytes()
        target = min(share, window.target_bytes)
        cursor = window.current.end if window.current else position
        while cursor < window.num_bytes:
            if existing := window.at(cursor):
                cursor = existing.end
                continue
            ahead = sum(block.num_bytes for block in window.blocks if block.end > position)
            wanted = min(size, window.free_until(cursor) - cursor, target - ahead)
            if wanted < size // 4 and cursor + wanted < window.num_bytes:
                break
            # Bytes that were read make room first, the earliest before the others.
            for block in [each for each in window.blocks if each.end <= position]:
                if window.used_bytes + wanted <= share and self._fits(wanted):
                    break
                self._drop(block)
            if window.used_bytes + wanted > share or not self._fits(wanted):
                break
            block = window.add(cursor, wanted)
            self._used_bytes += block.num_bytes
            self._queue.append(block)
            cursor = block.end
        self._start_queued()

    def _make_room(self, window: Window, position: int, wanted: int) -> int:
        """Returns how many of the bytes wanted fit, after dropping the blocks needed least.

        In this order: 1. Blocks that this reader has passed. 2. The last block of the file that
        holds most, while that is more than its share. 3. The last block of this file. A reader
        that waits always gets 64 KiB, even beyond the budget: else it would wait for ever.
        """
        for block in [each for each in window.blocks if each.end <= position]:
            if self._fits(wanted):
                return wanted
            self._drop(block)
        while not self._fits(wanted):
            others = [each for each in self._windows if each is not window]
            richest = max(others, key=lambda each: each.used_bytes, default=window)
            if richest.used_bytes <= self._share():
                richest = window
            if not richest.blocks:
                break
            self._drop(richest.blocks[-1])
        free = self._limit_bytes - self._used_bytes
        return min(wanted, max(free, _LEAST_BLOCK_BYTES))

    def _fits(self, num_bytes: int) -> bool:
        return self._used_bytes + num_bytes <= self._limit_bytes

    def _share(self) -> int:
        return min(MAX_WINDOW_BYTES, self._limit_bytes // max(1, len(self._windows)))

    def _block_bytes(self) -> int:
        return max(_LEAST_BLOCK_BYTES, min(MAX_BLOCK_BYTES, self._share() // 2))

    def _start_queued(self) -> None:
        while self._queue and len(self._running) < _MAX_RUNNING:
            block = self._queue.popleft()
            if not block.is_dropped and block.future is None:
                self._start(block)

    def _start(self, block: Block) -> None:
        block.data = bytearray(block.num_bytes)
        self._running.add(block)
        block.future = self._fetch(block)

    def _drop(self, block: Block) -> None:
        """Frees a block and cancels its requests; a reader that waits for it asks again."""
        if block.is_dropped:
            return
        block.is_dropped = True
        block.window.blocks.remove(block)
        if block.window.current is block:
            block.window.current = None
        self._used_bytes -= block.num_bytes
        self._running.discard(block)
        block.data = bytearray()
        if block.future is not None:
            block.future.cancel()
        if block.window.awaited is block:
            self._arrived.notify_all()
