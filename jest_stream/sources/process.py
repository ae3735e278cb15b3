"""One worker process, from both sides: what it does, and how the training process sees it.

In: the settings, some lanes, and where each goes on. Out, over a socket of its own: blocks of these
lanes in turn. It reads ahead as far as a number of blocks and of bytes allows; one block may always
be on its way, so that no limit can stop it for good.
"""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from jest_stream.errors import StalledError, WorkerDiedError
from jest_stream.sources import transport
from jest_stream.sources.blocks import Block, BlockSettings, LaneBlocks
from jest_stream.sources.watch import Notes
from jest_stream.types import Cursor

# A worker reads one turn over its lanes ahead: with blocks of one super-batch or less per turn,
# about as much as is being scored meanwhile. The bounds are for few lanes, and for descriptors,
# of which every block that waits holds one.
_MIN_AHEAD, _MAX_AHEAD = 2, 32

_STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker process is started with. Travels to it."""

    blocks: BlockSettings
    cursors: Mapping[int, Cursor]
    """The lanes that it reads, and where each goes on."""
    max_ahead_bytes: int
    """Most bytes of blocks that wait to be taken; one block may be larger."""


class Worker:
    """A worker process, as the training process sees it. Owns the process and two descriptors."""

    def __init__(self, context: Any, name: str, settings: WorkerSettings) -> None:
        self._name = name
        self._settings = settings
        self._notes = Notes()
        try:
            self._connection, theirs = socket.socketpair()
        except OSError:  # too many open files
            self._notes.close()
            raise
        self._connection.setblocking(False)
        self._method = context.get_start_method()
        self._process = context.Process(
            target=work, args=(theirs, self._notes, settings), name=f"jest_stream worker {name}"
        )
        self._process.daemon = True
        try:
            self._process.start()
        except EOFError as error:  # of the fork server, which imports the main script
            self._close()
            raise WorkerDiedError(f"worker {name} could not be started. {_GUARD}") from error
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()  # so that the connection ends when the worker does

    def receive(self, timeout_s: float) -> Block | transport.Failure:
        """Returns the worker's next message.

        Raises:
          WorkerDiedError: if it is gone, with what it was reading.
          StalledError: if it gave nothing for `timeout_s`, with its stacks.
        """
        try:
            message = transport.receive(self._connection, self._process.sentinel, timeout_s)
            self._connection.send(b"\0")  # it may read one more block ahead
        except TimeoutError:
            raise StalledError(
                f"{self._title()} gave nothing for timeout_s={timeout_s:g} seconds. A transform "
                "that hangs, or storage that does? If it is only slow, raise timeout_s or use "
                f"more workers. {self._notes.stacks(self._process.pid)}"
            ) from None
        except (EOFError, ConnectionError) as error:
            self._process.join(_STOP_TIMEOUT_S)
            if self._process.exitcode is None:
                raise  # it lives: the error is ours
            self._raise_died(error)
        return message

    def ask_to_stop(self) -> None:
        """Lets the process end, whatever it is doing."""
        self._process.terminate()

    def join(self, deadline: float) -> None:
        """Waits until the process is gone, not beyond `deadline`, and lets go of descriptors."""
        self._process.join(max(deadline - time.monotonic(), 0))
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(_STOP_TIMEOUT_S)  # one that waits for a disk ends when that answers
        if self._process.exitcode is not None:
            self._process.close()
        self._close()

    def _close(self) -> None:
        self._connection.close()
        self._notes.close()

    def _title(self) -> str:
        lanes = list(self._settings.cursors)
        shown = ", ".join(map(str, lanes[:8])) + (", ..." if len(lanes) > 8 else "")
        title = f"worker {self._name} (process {self._process.pid}), which reads lanes {shown},"
        place = self._notes.place
        if place is not None:
            shard = self._settings.blocks.source.shard_name(place.shard)
            title += f" last example {place.num_before} of shard {shard!r},"
        return title

    def _raise_died(self, cause: BaseException) -> NoReturn:
        status = self._process.exitcode
        how, why = f"ended with status {status}", "A transform that calls exit?"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            why = "Look for the reason in the system log."
        elif not self._notes.has_begun and self._method != "fork":
            how, why = f"{how} before it began", _GUARD
        if status == -signal.SIGKILL:
            why = "Often the system is out of memory: use fewer workers or a smaller super-batch."
        elif status == -signal.SIGSEGV:
            why = "A library crashed: look at that example, and at what decodes it."
        text = f"{self._title()} {how}. {why} {self._notes.last_stacks}"
        raise WorkerDiedError(text.rstrip()) from cause


_GUARD = (
    "Where workers are not forked, each imports the main script anew, and must not start the "
    'training again: put what the script does under if __name__ == "__main__":, or see above for '
    "the error of that import."
)


def stop(workers: list[Worker], owner_pid: int) -> None:
    """Ends all workers; does nothing in a process that was forked off their owner."""
    if os.getpid() != owner_pid:
        return
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for worker in workers:
        worker.join(deadline)
    workers.clear()


def work(connection: socket.socket, notes: Notes, settings: WorkerSettings) -> None:
    """What a worker process does: blocks of its lanes in turn, until it is stopped."""
    is_stopped = False

    def leave(*_: object) -> None:
        """Unwinds, so that nothing is left behind."""
        nonlocal is_stopped
        is_stopped = True  # what is raised here may be swallowed: Cython's imports do
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    # What was inherited is never collected here: its destructors may touch the GPU.
    gc.freeze()
    torch.set_num_threads(1)
    notes.begin()
    outbox = _Outbox(connection, len(settings.cursors), settings.max_ahead_bytes)
    lanes = {
        lane: LaneBlocks(settings.blocks, lane, cursor, note=notes.put)
        for lane, cursor in settings.cursors.items()
    }
    turns = deque(lanes)
    while turns and not is_stopped:
        lane = turns.popleft()
        try:
            block = lanes[lane].read()
            message = transport.dump_block(block)
        except Exception as error:
            message = transport.dump_failure(error)
            turns.clear()
        else:
            if not block.is_end:
                turns.append(lane)
        outbox.put(message)
    while not is_stopped:
        outbox.wait()


class _Outbox:
    """Messages on their way to the training process. Owns the thread that writes them.

    Writing waits while the training process computes; reading and decoding go on meanwhile.
    """

    def __init__(self, connection: socket.socket, num_lanes: int, max_bytes: int) -> None:
        self._connection = connection
        self._max_messages = min(max(_MIN_AHEAD, num_lanes), _MAX_AHEAD)
        self._max_bytes = max_bytes
        self._parent_pid = os.getppid()
        self._waiting: deque[int] = deque()  # sizes of what the training process has not taken
        self._queue: queue.SimpleQueue[transport.Message] = queue.SimpleQueue()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        threading.Thread(target=self._send, daemon=True).start()

    def put(self, message: transport.Message) -> None:
        """Sends a message; waits first, until there is room for it."""
        while self._waiting and (
            len(self._waiting) == self._max_messages
            or sum(self._waiting) + message.num_bytes > self._max_bytes
        ):
            self.wait()
            self._waiting.popleft()
        self._waiting.append(message.num_bytes)
        self._queue.put(message)

    def wait(self) -> None:
        """Returns when the training process has taken a message; exits when it is gone."""
        # Its end of the socket may have been inherited by another worker and outlive it.
        while not self._poll.poll(1000):
            if os.getppid() != self._parent_pid:
                sys.exit(1)
        try:
            taken = self._connection.recv(1)
        except OSError:
            taken = b""
        if not taken:
            sys.exit(1)

    def _send(self) -> None:
        try:
            while True:
                self._queue.get().send(self._connection)
        except OSError:
            pass  # nobody reads any more; the main thread will notice
