"""Reads lanes block by block, in this process or in worker processes: the same blocks either way.

In: a source, the lanes to read and where each goes on. Out: `Block`s, one lane after the other.
Runs in the training thread. Each worker owns some of the lanes and one socket; the reader takes the
next block from the worker that owns the next lane, so the order needs no agreement between workers,
and workers need not divide lanes.

torch's DataLoader is not used: it reports a killed worker by raising from a signal handler, at any
line of the training loop, and waits for ever for workers that were killed while they wrote to the
queue that they share. A socket ends when its worker does.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jest_stream.errors import BadExampleLimitError
from jest_stream.sources.blocks import Block, BlockSettings, LaneBlocks
from jest_stream.sources.read_task import ReadTask
from jest_stream.types import Cursor, Example, Source
from jest_stream.workers import (
    Failure,
    Finalizer,
    Job,
    Watchdog,
    Worker,
    WorkerTraceback,
    start_workers,
    stop_workers,
)

__all__ = ["Block", "BlockReader"]

_LOG = logging.getLogger("jest_stream")

_NUM_ON_PROBATION = 1000  # examples, before their rate of bad ones says anything


class BlockReader:
    """Reads lanes block by block, in lane order.

    Args:
      source: holds the shards.
      lanes: the lanes to read, in the order in which they take turns.
      num_lanes: lanes of the whole run, over all ranks.
      seed: of the deal, the orders and the random state that `prepare` runs on.
      cursors: the place where each of `lanes` goes on.
      block_size: examples per block.
      prepare: makes an item of an example; raises `BadExampleError` where it cannot.
      collate: makes the `items` of a block from the items of its examples.
      end_epoch: the epoch not to begin; None for endless lanes.
      on_bad_example: `"skip"` leaves bad examples out and names them in the block.
      on_bad_shard: `"skip"` leaves the rest of a shard that cannot be read out of the epoch, names
        it in the block and logs it.
      max_bad_fraction: share of bad examples, of a thousand or more, above which skipping ends.
      num_workers: processes; more than there are lanes are not started. 0: this one reads.
      timeout_s: longest wait for a worker's block; when reading here takes longer, it is logged.
      max_ahead_bytes: most bytes of blocks that each worker holds ready.
      reported_shards: names of bad shards that were logged before; those logged now are added.
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
        on_bad_shard: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        num_workers: int,
        timeout_s: float,
        max_ahead_bytes: int = 256 << 20,
        reported_shards: set[str] | None = None,
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
            on_bad_shard=on_bad_shard,
        )
        self._max_bad_fraction = max_bad_fraction
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._max_ahead_bytes = max_ahead_bytes
        self._reported_shards = set() if reported_shards is None else reported_shards
        self._turns = deque(lanes)  # lanes that have not ended; the next one first
        self._local: dict[int, LaneBlocks] = {}
        self._workers: dict[int, Worker] = {}  # by lane
        self._watchdog: Watchdog | None = None  # while lanes are read here
        self._stop: Finalizer | None = None
        self._num_good = self._num_bad = 0
        self.cursors: dict[int, Cursor] = {lane: cursors[lane] for lane in lanes}
        """Per lane, the place after the last block handed out."""

    def read(self) -> Block | None:
        """Returns the next block in lane order; None when all lanes have ended.

        The error of a lane or a worker is raised here, in place of its next block. After an error,
        as after `close()`, the next call reads on from `cursors`.

        Raises:
          WorkerDiedError: for a worker process that is gone.
          StalledError: for one that gave nothing for `timeout_s`.
          BadExampleLimitError: if too many examples are bad, in a row or in all.
          ConfigError: if the settings cannot be sent to a worker process.
          Exception: that of the source or of `prepare`, with its own type.
        """
        if not self._turns:
            self.close()
            return None
        try:
            self._check_rate()
            if not self._local and not self._workers:
                self._open()
            lane = self._turns[0]
            block = self._read_here(lane) if self._local else self._receive(lane)
        except BaseException:
            self.close()
            raise
        self._turns.popleft()
        if not block.is_end:
            self._turns.append(lane)
        if block.cursors:
            self.cursors[lane] = block.cursors[-1]
        self._num_good += block.num_examples
        self._num_bad += len(block.skipped)
        self._report(block)
        return block

    def close(self) -> None:
        """Stops workers and closes files. `read()` goes on where it stopped."""
        for lane in self._local.values():
            lane.close()
        self._local = {}
        self._workers = {}
        self._watchdog = None
        if self._stop is not None:
            self._stop()
            self._stop = None

    def __repr__(self) -> str:
        workers = len(set(self._workers.values()))
        return f"<BlockReader {len(self._turns)} lanes | {workers} worker processes>"

    def _open(self) -> None:
        lanes = list(self._turns)
        num_workers = min(self._num_workers, len(lanes))
        if num_workers == 0:
            watchdog = Watchdog(self._timeout_s, f"reading {self._settings.source!r}")
            # Also runs when the reader is dropped, and at interpreter exit.
            self._stop = Finalizer(self, watchdog.close)
            self._watchdog = watchdog
            self._local = {
                lane: LaneBlocks(self._settings, lane, self.cursors[lane]) for lane in lanes
            }
            return
        # Worker i of n reads every n-th lane from the i-th on: 5 lanes and 2 workers are (0, 2, 4)
        # and (1, 3). Lanes take turns, so that both are asked in turn too.
        tasks = [
            ReadTask(
                blocks=self._settings,
                cursors={lane: self.cursors[lane] for lane in lanes[number::num_workers]},
                max_ahead_bytes=self._max_ahead_bytes,
            )
            for number in range(num_workers)
        ]
        jobs = [
            Job(f"worker {number} of {num_workers}", task, task.describe)
            for number, task in enumerate(tasks)
        ]
        # The finalizer knows the list before the first process exists: whenever an interrupt comes,
        # every process that was started is stopped.
        workers: list[Worker] = []
        self._stop = Finalizer(self, stop_workers, workers, os.getpid())
        start_workers(workers, jobs)
        for worker, task in zip(workers, tasks, strict=True):
            self._workers.update(dict.fromkeys(task.cursors, worker))

    def _read_here(self, lane: int) -> Block:
        assert self._watchdog is not None
        with self._watchdog:
            return self._local[lane].read()

    def _receive(self, lane: int) -> Block:
        message = self._workers[lane].receive(self._timeout_s)
        self._workers[lane].acknowledge()  # it may read one more block ahead
        if isinstance(message, Failure):
            try:
                raise message.error from WorkerTraceback(message.traceback)
            finally:
                del message  # its error's traceback holds this frame
        assert isinstance(message, Block) and message.lane == lane
        counts = dict(message.counts)
        # The worker counted the requests of reading; this process those of opening the source.
        for name, amount in self._settings.source.take_counts().items():
            counts[name] = counts.get(name, 0) + amount
        return replace(message, counts=counts)

    def _check_rate(self) -> None:
        """Raises if too many of the examples handed out so far were bad; begins anew then."""
        total, num_bad = self._num_good + self._num_bad, self._num_bad
        if total < _NUM_ON_PROBATION or num_bad <= self._max_bad_fraction * total:
            return
        self._num_good = self._num_bad = 0
        raise BadExampleLimitError(
            f"{num_bad:,} of {total:,} examples are bad, more than "
            f"max_bad_fraction={self._max_bad_fraction:g}. Look at the metrics named skipped/..., "
            "and repair or filter the data, or raise max_bad_fraction if that many are expected."
        )

    def _report(self, block: Block) -> None:
        """Logs bad shards, each once."""
        for _, skip in block.skipped_shards:
            if skip.shard not in self._reported_shards:
                self._reported_shards.add(skip.shard)
                _LOG.warning(
                    'on_bad_shard="skip" leaves the rest of a shard out of this epoch: %s',
                    skip.message,
                )
