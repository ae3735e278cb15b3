"""Reads super-batches: examples go in, super-batches come out, each with the place where it starts.

Blocks come lane by lane; their examples are dealt out one of each lane in turn, which makes the
order independent of block sizes and worker processes. Runs in the training thread. Shapes: B:
super-batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jest_stream.config import Layout, Sizes, StreamConfig
from jest_stream.pipeline.device import PendingSelection, Slot
from jest_stream.sources import Block, BlockReader
from jest_stream.types import Cursor, Example, Source
from jest_stream.views import Columns, collate, require_same_fields

_BLOCK_SIZE = 64  # examples of one lane handed over at once: more only adds latency


class Position(NamedTuple):
    """A place in the stream of a rank, at which reading may start."""

    cursors: dict[int, Cursor]
    """Per lane, where it goes on."""
    next_lane: int
    """Index into the sorted lanes: the lane whose turn it is."""

    @classmethod
    def of_epoch(cls, epoch: int, lanes: Iterable[int]) -> Position:
        """Returns the start of a pass over some lanes."""
        return cls({lane: Cursor(epoch, 0, 0, 0) for lane in lanes}, 0)


@dataclass(frozen=True, kw_only=True)
class SuperBatch:
    """Candidates that are scored together."""

    columns: Columns
    """One entry per candidate, in global order; tensors `[B, ...]` lie on the scoring device."""
    on_host: Columns
    """The same in host memory, as long as the slot is not used again."""
    slot: Slot
    """The owner of the columns' memory."""
    size: int
    """B: the number of candidates."""
    position: Position
    """The place where reading it again would begin."""
    skipped: dict[str, int]
    """Bad examples left out on the way, by reason."""
    counts: dict[str, int] = field(default_factory=dict)
    """Bad shards left out on the way (`shards_skipped`, `shards_skipped/REASON`), and the counts of
    the source since the super-batch before, such as bytes and retries."""


@dataclass(frozen=True, kw_only=True)
class ScoredSuperBatch:
    """A super-batch in flight: its sub-batch is selected, and not yet handed out."""

    super_batch: SuperBatch
    selection: PendingSelection
    weights_step: int | None
    """The step whose learner weights it was scored with; None without a learner."""


class SuperBatchReader:
    """Reads super-batches. Owns the lanes' readers, and the blocks not yet dealt out.

    Lanes take turns, one example each: lanes 0 and 1 with examples a, b, c and x, y give a, x, b,
    y, c, since a lane that has ended is passed over.

    Args:
      config: how to read.
      sizes: of the super-batches.
      source: where the shards are.
      layout: names the lanes to read. May be replaced while none is open.
      prepare: makes a row of an example.
    """

    def __init__(
        self,
        config: StreamConfig,
        sizes: Sizes,
        *,
        source: Source,
        layout: Layout,
        prepare: Callable[[Example], dict[str, Any]],
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._source = source
        self._prepare = prepare
        self._reported_shards: set[str] = set()  # bad shards, each of which is logged once
        self._reader: BlockReader | None = None
        self.layout = layout
        self.go_to(Position.of_epoch(0, layout.lanes))

    @property
    def position(self) -> Position:
        """Tells where the next super-batch to be read starts."""
        return Position(dict(self._cursors), self._next_lane)

    @property
    def is_open(self) -> bool:
        """Tells whether lanes were opened since the last `go_to`."""
        return self._reader is not None

    def go_to(self, position: Position) -> None:
        """Closes the lanes and drops the examples read of them; reading goes on at `position`."""
        self.pause()
        self._reader = None
        self._lanes = sorted(position.cursors)
        self._cursors, self._next_lane = dict(position.cursors), position.next_lane
        self._blocks: dict[int, tuple[Block, int]] = {}  # lane -> block, examples taken of it
        self._waiting: dict[int, list[Block]] = {lane: [] for lane in self._lanes}
        self._ended: set[int] = set()
        self._skipped: dict[str, int] = {}  # since the super-batch at hand was begun
        self._counts: dict[str, int] = {}  # likewise

    def pause(self) -> None:
        """Stops workers and closes files. The next `read` goes on where the last one stopped."""
        if self._reader is not None:
            self._reader.close()

    def read(self, size: int, *, slot: Slot, end_epoch: int | None) -> SuperBatch:
        """Returns the next `size` examples; fewer where the stream ends.

        Args:
          size: B.
          slot: the memory to put them in.
          end_epoch: the epoch not to begin; None for endless lanes. Looked at when lanes open.
        """
        if self._reader is None:
            self._reader = self._open(end_epoch)
        position = self.position
        self._skipped, self._counts = {}, {}
        picks: list[tuple[Block, int]] = []
        while len(picks) < size:
            lane = self._lanes[self._next_lane]
            if self._has_next(lane, self._reader):
                picks.append(self._next_of(lane))
            elif len(self._ended) == len(self._lanes):
                break
            # An ended lane's turn passes too: the order of the others stays.
            self._next_lane = (self._next_lane + 1) % len(self._lanes)
        gathered = _gather_blocks(picks, slot)
        return SuperBatch(
            columns=slot.fill(gathered),
            on_host=gathered,
            slot=slot,
            size=len(picks),
            position=position,
            skipped=self._skipped,
            counts=self._counts,
        )

    def _open(self, end_epoch: int | None) -> BlockReader:
        config = self._config
        return BlockReader(
            self._source,
            lanes=self.layout.lanes,
            num_lanes=self.layout.num_lanes,
            seed=config.seed,
            cursors=self._cursors,
            # No more of a lane than the largest super-batch takes of it: for 20 candidates of 5
            # lanes blocks of 4.
            block_size=max(1, min(_BLOCK_SIZE, self._sizes.largest // len(self._lanes))),
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

    def _next_of(self, lane: int) -> tuple[Block, int]:
        block, taken = self._blocks[lane]
        self._count_skipped(block, taken)
        self._blocks[lane] = (block, taken + 1)
        self._cursors[lane] = block.cursors[taken]
        return block, taken

    def _has_next(self, lane: int, reader: BlockReader) -> bool:
        """Returns whether the lane has an example to give; reads blocks until that is known."""
        while lane not in self._ended:
            # There are three cases:
            # 1. The lane's block is begun. If all of it is taken, the lane ends or needs the next.
            if lane in self._blocks:
                block, taken = self._blocks[lane]
                if taken < block.num_examples:
                    return True
                self._count_skipped(block, taken)
                del self._blocks[lane]
                if block.is_end:
                    self._ended.add(lane)
            # 2. A block waits that came while another lane was asked for.
            elif self._waiting[lane]:
                self._blocks[lane] = (self._waiting[lane].pop(0), 0)
            # 3. Blocks come in the reader's order, of any lane; none is left where all have ended.
            elif (next_block := reader.read()) is None:
                self._ended.update(self._lanes)
            else:
                self._waiting[next_block.lane].append(next_block)
                for name, amount in next_block.counts.items():
                    self._count(name, amount)
        return False

    def _count_skipped(self, block: Block, taken: int) -> None:
        """Counts bad examples and shards that lie just before example number `taken`."""
        for num_before, reason in block.skipped:
            if num_before == taken:
                self._skipped[reason] = self._skipped.get(reason, 0) + 1
        for num_before, shard in block.skipped_shards:
            if num_before == taken:
                self._count("shards_skipped", 1)
                self._count(f"shards_skipped/{shard.reason}", 1)

    def _count(self, name: str, amount: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount


def _gather_blocks(picks: Sequence[tuple[Block, int]], slot: Slot) -> Columns:
    """Returns the picked rows as columns, in the order of the picks; each tensor is copied once.

    For example, picks of row 3 of block a, row 0 of b and row 4 of a copy rows [3, 4] of a to rows
    [0, 2], and row [0] of b to row [1].
    """
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
            columns[name] = [block.items[name][taken] for block, taken in picks]
    return columns
