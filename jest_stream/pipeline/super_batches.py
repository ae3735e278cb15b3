"""Examples in, super-batches out: a window over the lanes, with the position where it starts.

Blocks arrive lane by lane; the window deals them out round robin, one example of each lane in
turn, so that the order of examples does not depend on block sizes or worker processes. It runs in
the training process. What it holds beyond the current super-batch is at most one block per lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jest_stream.config import Layout, Sizes, StreamConfig
from jest_stream.pipeline.device import Choice, Slot
from jest_stream.sources import Block, BlockReader
from jest_stream.types import Cursor, Source
from jest_stream.views import Columns, ScoreView, collate, require_same_fields


class Position(NamedTuple):
    """Where in the stream a super-batch starts."""

    cursors: dict[int, Cursor]
    """Per lane, what it reads next."""
    next_lane: int
    """Whose turn it is: an index into the sorted lanes."""


@dataclass(frozen=True, kw_only=True)
class SuperBatch:
    """Candidates that are scored together."""

    columns: Columns
    """One entry per candidate, in global order; tensors lie on the scoring device."""
    on_host: Columns
    """The same in memory of the host, as long as the slot is not used again."""
    slot: Slot
    """What keeps their memory."""
    size: int
    """How many candidates there are."""
    start: Position
    """Where reading it again would start."""
    skipped: dict[str, int]
    """Bad examples left out on the way, by reason."""
    counts: dict[str, int] = field(default_factory=dict)
    """Bad shards left out on the way (`shards_skipped`, `shards_skipped/REASON`), and what the
    source counted since the super-batch before, such as bytes and retries."""


class Window:
    """Cuts the stream into super-batches. Owns what was read and not yet dealt out."""

    def __init__(self, reader: BlockReader, start: Position) -> None:
        self._reader = reader
        self._lanes = sorted(start.cursors)
        self._cursors = dict(start.cursors)
        self._next_lane = start.next_lane
        self._blocks: dict[int, tuple[Block, int]] = {}  # lane -> block, examples taken of it
        self._waiting: dict[int, list[Block]] = {lane: [] for lane in self._lanes}
        self._ended: set[int] = set()
        self._skipped: dict[str, int] = {}  # since the super-batch at hand was begun
        self._counts: dict[str, int] = {}  # likewise

    @property
    def position(self) -> Position:
        """Where the next super-batch starts."""
        return Position(dict(self._cursors), self._next_lane)

    def take(self, size: int, *, slot: Slot) -> SuperBatch:
        """Returns the next `size` examples, in a slot; fewer where the stream ends."""
        start = self.position
        self._skipped, self._counts = {}, {}
        picks: list[tuple[Block, int]] = []
        while len(picks) < size:
            lane = self._lanes[self._next_lane]
            if self._fill(lane):
                picks.append(self._next_of(lane))
            elif len(self._ended) == len(self._lanes):
                break
            self._next_lane = (self._next_lane + 1) % len(self._lanes)
        gathered = _gather_blocks(picks, slot)
        return SuperBatch(
            columns=slot.fill(gathered),
            on_host=gathered,
            slot=slot,
            size=len(picks),
            start=start,
            skipped=self._skipped,
            counts=self._counts,
        )

    def _next_of(self, lane: int) -> tuple[Block, int]:
        block, taken = self._blocks[lane]
        self._count_skipped(block, taken)
        self._blocks[lane] = (block, taken + 1)
        self._cursors[lane] = block.cursors[taken]
        return block, taken

    def _count_skipped(self, block: Block, before: int) -> None:
        for position, reason in block.skipped:
            if position == before:
                self._skipped[reason] = self._skipped.get(reason, 0) + 1
        for position, shard in block.skipped_shards:
            if position == before:
                self._count("shards_skipped", 1)
                self._count(f"shards_skipped/{shard.reason}", 1)

    def _count(self, name: str, amount: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def _fill(self, lane: int) -> bool:
        """Makes sure that the lane has an example to give; False if it has ended."""
        while lane not in self._ended:
            if lane in self._blocks:
                block, taken = self._blocks[lane]
                if taken < block.num_examples:
                    return True
                self._count_skipped(block, taken)
                del self._blocks[lane]
                if block.is_end:
                    self._ended.add(lane)
            elif self._waiting[lane]:
                block = self._waiting[lane].pop(0)
                self._blocks[lane] = (block, 0)
            else:
                next_block = self._reader.read()
                if next_block is None:
                    self._ended.update(self._lanes)
                else:
                    self._waiting[next_block.lane].append(next_block)
                    for name, amount in next_block.counts.items():
                        self._count(name, amount)
        return False


def take_rows(columns: Columns, choice: Choice) -> Columns:
    """Returns the chosen rows, on the device where each column lies."""
    chosen: list[int] | None = None
    taken: Columns = {}
    for name, column in columns.items():
        if isinstance(column, Tensor):
            taken[name] = column.index_select(0, choice.on_device.indices.to(column.device))
        else:
            chosen = choice.on_host().indices.tolist() if chosen is None else chosen
            taken[name] = [column[i] for i in chosen]
    return taken


def take_rows_on_host(columns: Columns, indices: Tensor) -> Columns:
    """Returns the rows `indices` of columns that lie on the host, as `indices` do."""
    chosen = indices.tolist()
    return {
        name: column[indices] if isinstance(column, Tensor) else [column[i] for i in chosen]
        for name, column in columns.items()
    }


def _gather_blocks(picks: Sequence[tuple[Block, int]], slot: Slot) -> Columns:
    """Returns the picked rows as columns, in the order of the picks; each tensor is copied once."""
    rows_of: dict[int, tuple[Mapping[str, Any], list[int], list[int]]] = {}
    for row, (block, taken) in enumerate(picks):
        _, sources, targets = rows_of.setdefault(id(block), (block.items, [], []))
        sources.append(taken)
        targets.append(row)
    require_same_fields([dict(items) for items, _, _ in rows_of.values()])
    columns: Columns = {}
    for name, first in picks[0][0].items.items() if picks else ():
        if isinstance(first, Tensor):
            out = slot.column(name, first, len(picks))
            for items, sources, targets in rows_of.values():
                out[torch.tensor(targets)] = items[name][torch.tensor(sources)]
            columns[name] = out
        else:
            column: list[Any] = [None] * len(picks)
            for items, sources, targets in rows_of.values():
                for source, target in zip(sources, targets, strict=True):
                    column[target] = items[name][source]
            columns[name] = column
    return columns


_BLOCK_SIZE = 64  # examples of one lane handed over at once: more only adds latency


class Feed:
    """Reads super-batches. Owns the reader and the window; knows where both would begin anew.

    Args:
      config: how to read.
      sizes: of the super-batches.
      source: where the shards are.
      layout: whose lanes are read. May be replaced while nothing is open.
      prepare: makes a row of an example.
    """

    def __init__(
        self,
        config: StreamConfig,
        sizes: Sizes,
        *,
        source: Source,
        layout: Layout,
        prepare: ScoreView,
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._source = source
        self._prepare = prepare
        self._reader: BlockReader | None = None
        self._window: Window | None = None
        self._start = Position({}, 0)
        self._reported_shards: set[str] = set()  # bad ones that were logged: each is once
        self.layout = layout
        """Whose lanes are read."""

    @property
    def position(self) -> Position:
        """Where the next super-batch to be read starts."""
        return self._start if self._window is None else self._window.position

    @property
    def is_open(self) -> bool:
        """Whether examples were read that have not been dealt out."""
        return self._window is not None

    def go_to(self, position: Position) -> None:
        """Closes what is open and drops what it read; reading goes on at `position`."""
        self.pause()
        self._reader = self._window = None
        self._start = position

    def take(self, size: int, *, slot: Slot, end_epoch: int | None) -> SuperBatch:
        """Returns the next `size` examples, in a slot; fewer where the stream ends.

        Args:
          size: how many.
          slot: where they are wanted.
          end_epoch: the epoch not to begin; None for endless lanes. Looked at when lanes open.
        """
        if self._window is None:
            self._window = self._open(end_epoch)
        return self._window.take(size, slot=slot)

    def pause(self) -> None:
        """Stops workers and closes files. The next `take` goes on where the last one stopped."""
        if self._reader is not None:
            self._reader.close()

    def _open(self, end_epoch: int | None) -> Window:
        config, start = self._config, self._start
        self._reader = BlockReader(
            self._source,
            lanes=self.layout.lanes,
            num_lanes=self.layout.num_lanes,
            seed=config.seed,
            cursors=start.cursors,
            block_size=max(1, min(_BLOCK_SIZE, self._sizes.largest // len(start.cursors))),
            prepare=self._prepare,
            collate=collate,
            end_epoch=end_epoch,
            on_bad_example=config.on_bad_example,
            on_bad_shard=config.on_bad_shard,
            max_bad_fraction=config.max_bad_fraction,
            num_workers=config.num_workers,
            timeout_s=config.timeout_s,
            reported_shards=self._reported_shards,
        )
        return Window(self._reader, start)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A super-batch in flight: chosen from, not yet handed out."""

    super_batch: SuperBatch
    choice: Choice
    weights_step: int | None
    """The step whose learner weights it was scored with; None without a learner."""
