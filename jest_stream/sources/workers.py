"""Lanes read block by block, in this process or in worker processes: the same blocks either way.

In: a source, the lanes to read and where each goes on. Out: `Block`s, one lane after the other.
This module alone starts processes. Each worker owns some of the lanes and a pipe of its own; the
reader takes the next block from the worker that owns the next lane, so the order needs no
agreement between workers, and workers need not divide lanes.

Why not torch's DataLoader: it reports a killed worker by raising from a signal handler, wherever
the training loop happens to be, and waits for ever for workers that were killed while they wrote
to the queue that they share. A pipe of its own ends when its worker does.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, NoReturn

import torch
import torch.multiprocessing

from jest_stream.errors import ConfigError, StalledError, WorkerDiedError
from jest_stream.sources import transport
from jest_stream.sources.blocks import Block, BlockSettings, LaneBlocks
from jest_stream.types import Cursor, Example, Source

__all__ = ["Block", "BlockReader"]

# A worker reads one turn over its lanes ahead: with blocks of one super-batch or less per turn,
# about as much as is being scored meanwhile. The bounds are for few lanes, and for descriptors,
# of which every tensor that waits holds one.
_MIN_AHEAD, _MAX_AHEAD = 2, 32

_STOP_TIMEOUT_S = 5.0


class BlockReader:
    """Reads lanes block by block, in lane order.

    Args:
      source: where the shards are.
      lanes: the lanes to read, in the order in which they take turns.
      num_lanes: lanes of the whole run, over all ranks.
      seed: of the deal, the orders and the random state that `prepare` runs on.
      cursors: where each of `lanes` goes on.
      block_size: examples per block.
      prepare: makes an item of an example; raises `BadExampleError` where it cannot.
      collate: makes the `items` of a block from the items of its examples.
      end_epoch: the epoch not to begin; None for endless lanes.
      on_bad_example: `"skip"` leaves bad examples out and names them in the block.
      num_workers: processes; more than there are lanes are not started. 0: this one reads.
      timeout_s: longest wait for a worker's block.
    """

    def __init__(
        self,
        source: Source,
        *,
        lanes: Sequence[int],
        num_lanes: int,
        seed: int,
        cursors: Mapping[int, Cursor],
        block_size: int,
        prepare: Callable[[Example], Any],
        collate: Callable[[list[Any]], Any],
        end_epoch: int | None,
        on_bad_example: Literal["raise", "skip"],
        num_workers: int,
        timeout_s: float,
    ) -> None:
        self._settings = BlockSettings(
            source=source,
            num_lanes=num_lanes,
            seed=seed,
            block_size=block_size,
            prepare=prepare,
            collate=collate,
            end_epoch=end_epoch,
            on_bad_example=on_bad_example,
        )
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._turns = deque(lanes)  # lanes that have not ended; the next one first
        self._local: dict[int, LaneBlocks] = {}
        self._workers: dict[int, _Worker] = {}  # by lane
        self._stop_workers: Callable[[], object] | None = None
        self.cursors: dict[int, Cursor] = {lane: cursors[lane] for lane in lanes}
        """Per lane, what comes behind the last block handed out."""

    def read(self) -> Block | None:
        """Returns the next block in lane order; None when all lanes have ended.

        What goes wrong in a lane or a worker is raised here, where its next block would have
        come. After an error, as after `close()`, the next call reads on from `cursors`.

        Raises:
          WorkerDiedError: for a worker process that is gone.
          StalledError: for one that gave nothing for `timeout_s`.
          ConfigError: if the settings cannot be sent to a worker process.
          Exception: what the source or `prepare` raised, with its own type.
        """
        if not self._turns:
            self.close()
            return None
        try:
            if not self._local and not self._workers:
                self._open()
            lane = self._turns[0]
            block = self._local[lane].read() if self._local else self._receive(lane)
        except BaseException:
            self.close()
            raise
        self._turns.popleft()
        if not block.is_end:
            self._turns.append(lane)
        if block.cursors:
            self.cursors[lane] = block.cursors[-1]
        return block

    def close(self) -> None:
        """Stops workers and closes files. `read()` goes on where it stopped."""
        for lane in self._local.values():
            lane.close()
        self._local = {}
        self._workers = {}
        if self._stop_workers is not None:
            self._stop_workers()
            self._stop_workers = None

    def __repr__(self) -> str:
        workers = len(set(self._workers.values()))
        return f"<BlockReader {len(self._turns)} lanes | {workers} worker processes>"

    def _open(self) -> None:
        lanes = list(self._turns)
        num_workers = min(self._num_workers, len(lanes))
        if num_workers == 0:
            self._local = {
                lane: LaneBlocks(self._settings, lane, self.cursors[lane]) for lane in lanes
            }
            return
        context = torch.multiprocessing.get_context()
        if context.get_start_method() != "fork":
            _check_picklable(self._settings)
        workers: list[_Worker] = []
        # Also runs when the reader is dropped, and at interpreter exit.
        self._stop_workers = weakref.finalize(self, _stop, workers, os.getpid())
        for number in range(num_workers):
            own = {lane: self.cursors[lane] for lane in lanes[number::num_workers]}
            worker = _Worker(context, f"{number} of {num_workers}", self._settings, own)
            workers.append(worker)
            self._workers.update(dict.fromkeys(own, worker))

    def _receive(self, lane: int) -> Block:
        message = self._workers[lane].receive(self._timeout_s)
        if isinstance(message, transport.Failure):
            raise message.error from transport.WorkerTraceback(message.traceback)
        assert message.lane == lane
        return message


class _Worker:
    """A worker process, as the training process sees it."""

    def __init__(
        self,
        context: Any,
        name: str,
        settings: BlockSettings,
        cursors: Mapping[int, Cursor],
    ) -> None:
        self._name = name
        self._lanes = list(cursors)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, settings, cursors), name=f"jest_stream worker {name}"
        )
        self._process.daemon = True
        try:
            self._process.start()
        finally:
            theirs.close()  # so that the pipe ends when the worker does

    def receive(self, timeout_s: float) -> Block | transport.Failure:
        """Returns the worker's next message."""
        ready = wait([self._connection, self._process.sentinel], timeout_s)
        if not ready:
            raise StalledError(
                f"{self._title()} gave nothing for timeout_s={timeout_s:g} seconds. A transform "
                "that hangs, or storage that does? If it is only slow, raise timeout_s or use "
                "more workers."
            )
        try:
            message = transport.load(self._connection.recv_bytes())
            self._connection.send_bytes(b"")  # it may read one more block ahead
        except (EOFError, OSError) as error:
            self._process.join(_STOP_TIMEOUT_S)
            if self._process.exitcode is None:
                raise  # it lives: the error is ours
            self._raise_died(error)
        return message

    def ask_to_stop(self) -> None:
        """Lets the process end, whatever it is doing."""
        self._process.terminate()

    def join(self) -> None:
        """Waits until the process is gone, and lets go of its descriptors."""
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()
        self._connection.close()

    def _title(self) -> str:
        lanes = ", ".join(map(str, self._lanes[:8])) + (", ..." if len(self._lanes) > 8 else "")
        return f"worker {self._name} (process {self._process.pid}), which reads lanes {lanes},"

    def _raise_died(self, cause: BaseException) -> NoReturn:
        status = self._process.exitcode
        how, why = f"ended with status {status}", "A transform that calls exit?"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            why = "Look for the reason in the system log."
        if status == -signal.SIGKILL:
            why = "Often the system is out of memory: use fewer workers or a smaller super-batch."
        elif status == -signal.SIGBUS:
            why = "Often /dev/shm is full: give the container more shared memory (--shm-size)."
        raise WorkerDiedError(f"{self._title()} {how}. {why}") from cause


def _stop(workers: list[_Worker], owner_pid: int) -> None:
    """Ends all workers; does nothing in a process that was forked off their owner."""
    if os.getpid() != owner_pid:
        return
    for worker in workers:
        worker.ask_to_stop()
    for worker in workers:
        worker.join()
    workers.clear()


def _work(connection: Connection, settings: BlockSettings, cursors: Mapping[int, Cursor]) -> None:
    """What a worker process does: blocks of its lanes in turn, until it is stopped."""
    is_stopped = False

    def stop(*_: object) -> None:
        """Unwinds, so that nothing is left behind."""
        nonlocal is_stopped
        is_stopped = True  # what is raised here may be swallowed: Cython's imports do
        sys.exit()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    # What was inherited is never collected here: its destructors may touch the GPU.
    gc.freeze()
    torch.set_num_threads(1)
    parent_pid = os.getppid()
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Writing waits while the training process computes; reading and decoding go on meanwhile.
    threading.Thread(target=_send, args=(connection, outbox), daemon=True).start()
    lanes = {lane: LaneBlocks(settings, lane, cursor) for lane, cursor in cursors.items()}
    turns = deque(lanes)
    num_free = min(max(_MIN_AHEAD, len(turns)), _MAX_AHEAD)
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
        if num_free == 0:
            _wait_for_parent(connection, parent_pid)
            num_free += 1
        num_free -= 1
        outbox.put(message)
    while not is_stopped:  # tensors live here until they are fetched: wait to be stopped
        _wait_for_parent(connection, parent_pid)


def _send(connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            connection.send_bytes(outbox.get())
    except OSError:
        pass  # nobody reads any more; the main thread will notice


def _wait_for_parent(connection: Connection, parent_pid: int) -> None:
    """Returns when the training process has taken a block; exits when it is gone."""
    # Its end of the pipe may have been inherited by another worker and outlive it: look for it.
    while not connection.poll(1.0):
        if os.getppid() != parent_pid:
            sys.exit(1)
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        sys.exit(1)


def _check_picklable(settings: BlockSettings) -> None:
    """Demands what starting a process needs where it is not forked."""
    try:
        ForkingPickler.dumps(settings)
    except Exception as error:
        method = torch.multiprocessing.get_start_method()
        raise ConfigError(
            f"the source or a transform, tokenizer or key cannot be sent to a worker process "
            f"({type(error).__name__}: {error}), as the start method {method!r} needs. Define it "
            "at the top level of a module instead of a lambda or inner function, or pass "
            "num_workers=0."
        ) from error
