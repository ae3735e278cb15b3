"""Reads blocks of some lanes in turn and ahead of time: the task of a reading worker.

In: the settings, some lanes, and the place where each goes on. Out, over the socket: blocks. The
worker reads ahead within a number of blocks and of bytes; one block may always be on its way, so
no limit can stop it for good. A second thread of the worker writes to the socket.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from jest_stream.sources.blocks import BlockSettings, LaneBlocks
from jest_stream.types import Cursor
from jest_stream.workers import Activity, Message, ParentConnection, WorkerStatus, failure_message

# A worker reads one turn over its lanes ahead: with blocks of one super-batch or less per turn,
# about as much as is being scored meanwhile. The lower bound is for few lanes, the upper one for
# descriptors, of which every block that waits holds one.
_MIN_AHEAD, _MAX_AHEAD = 2, 32


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """The work of one reading worker. Travels to it."""

    blocks: BlockSettings
    cursors: Mapping[int, Cursor]
    """The lanes that it reads, and the place where each goes on."""
    max_ahead_bytes: int
    """Most bytes of blocks that wait to be taken; one block may be larger."""

    def run(self, parent: ParentConnection, status: WorkerStatus) -> None:
        """Sends blocks of the lanes in turn, and an error as the last word."""
        outbox = _Outbox(parent, len(self.cursors), self.max_ahead_bytes)
        lanes = {
            lane: LaneBlocks(self.blocks, lane, cursor, note=status.put)
            for lane, cursor in self.cursors.items()
        }
        turns = deque(lanes)
        while turns and parent.wants_more:
            lane = turns.popleft()
            try:
                block = lanes[lane].read()
                message = Message(block)
            except Exception as error:
                message = failure_message(error)
                turns.clear()
            else:
                if not block.is_end:
                    turns.append(lane)
            outbox.put(message)
        # All is read, but not all is taken: to end now would close the socket on the rest.
        while parent.wants_more:
            outbox.wait()

    def describe(self, activity: Activity | None) -> str:
        """Returns the worker's lanes and the example that it read last, for an error's text."""
        lanes = list(self.cursors)
        shown = ", ".join(map(str, lanes[:8])) + (", ..." if len(lanes) > 8 else "")
        text = f"reads lanes {shown}"
        if activity is not None:
            shard = self.blocks.source.shard_name(activity.number)
            text += f", last example {activity.position} of shard {shard!r}"
        return text


class _Outbox:
    """Sends messages to the training process. Owns the thread that writes them.

    Writing waits while the training process computes; reading and decoding go on meanwhile.
    """

    def __init__(self, parent: ParentConnection, num_lanes: int, max_bytes: int) -> None:
        self._parent = parent
        self._max_messages = min(max(_MIN_AHEAD, num_lanes), _MAX_AHEAD)
        self._max_bytes = max_bytes
        self._waiting: deque[int] = deque()  # sizes of the messages that were not taken yet
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._send, daemon=True).start()

    def put(self, message: Message) -> None:
        """Sends a message; waits first, until there is room for it."""
        # With 8 lanes at most 8 messages wait, and no more bytes than the limit. A message larger
        # than the limit goes alone: nothing waits then, so the loop ends.
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
        # The training process sends one byte for each message that it has taken.
        self._parent.wait()
        try:
            taken = self._parent.connection.recv(1)
        except OSError:
            taken = b""
        if not taken:
            sys.exit(1)

    def _send(self) -> None:
        try:
            while True:
                self._queue.get().send(self._parent.connection)
        except OSError:
            pass  # nobody reads any more; the main thread will notice
