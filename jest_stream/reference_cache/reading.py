"""Reads the examples of some shards, to be embedded, with a mark where each shard ends.

In: a source and the shards to read. Out: slices of stacked rows of one shard, in its order, from
this process or from workers. Each slice names the examples that were left out before its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

from jest_stream.errors import BadExampleError
from jest_stream.reference_cache.settings import BuildSettings
from jest_stream.sources import Block, BlockReader
from jest_stream.types import Cursor, Example, Source
from jest_stream.views import Columns, Row, ScoreView, collate

_BLOCK_SIZE = 64
_SHARD, _END = "__cached_shard__", "__end__"


class ShardSlice(NamedTuple):
    """Some examples of one shard, or the news that it has ended."""

    shard: int
    columns: Columns
    """Stacked; empty at the end of the shard."""
    num_read: list[int]
    """Per example, how many of the shard were read with it, unusable ones too; at the end of the
    shard one number: all."""
    skipped: list[tuple[int, str]]
    """Examples that were left out: the position in the slice before which, and the reason."""
    is_end: bool


def read_slices(
    source: Source, shards: Sequence[int], *, start: int, view: ScoreView, settings: BuildSettings
) -> Iterator[ShardSlice]:
    """Yields the examples of some shards, those of a shard in order.

    Args:
      source: holds the shards.
      shards: numbers of the shards to read, at least one.
      start: examples to pass over in each; for a source of one shard.
      view: makes a row of an example.
      settings: number of workers, treatment of bad examples, time limit.
    """
    # A lane per worker, so that all of them read; one epoch, so that each shard is read once.
    num_lanes = max(1, min(settings.num_workers, len(shards)))
    reader = BlockReader(
        _Marked(source, shards),
        lanes=range(num_lanes),
        num_lanes=num_lanes,
        seed=0,
        cursors={lane: Cursor(0, 0, 0, start) for lane in range(num_lanes)},
        block_size=_BLOCK_SIZE,
        prepare=partial(_prepared, view),
        collate=_collate,
        end_epoch=1,
        on_bad_example=settings.on_bad_example,
        max_bad_fraction=settings.max_bad_fraction,
        num_workers=settings.num_workers,
        timeout_s=settings.timeout_s,
    )
    late: dict[int, list[str]] = {}  # by lane: left out after the last example of a block
    try:
        while (block := reader.read()) is not None:
            yield from _slices(block, late)
    finally:
        reader.close()


def _slices(block: Block, late: dict[int, list[str]]) -> Iterator[ShardSlice]:
    """Yields the slices of a block.

    Examples that were left out at its very end belong to the slice that follows in its lane: they
    are kept in `late` until then. The mark at the end of each shard takes up the last ones.
    """
    # Skipped examples carry a position in the block. Slices of 4 and 3 rows: the reason at position
    # 5 belongs to the second slice, at its position 1; one at position 7 waits for the next block.
    skipped = [(0, reason) for reason in late.pop(block.lane, [])] + list(block.skipped)
    first = 0
    for shard, size, columns in block.items or ():
        is_end = columns is None
        cursors = block.cursors[first : first + size]
        yield ShardSlice(
            shard,
            columns or {},
            # The reader counted the mark of the end as an example, too.
            [cursor.num_before - is_end for cursor in cursors],
            [(at - first, reason) for at, reason in skipped if first <= at < first + size],
            is_end,
        )
        first += size
    late[block.lane] = [reason for at, reason in skipped if at >= first]


class _Marked(Source):
    """Some shards of a source, each with a mark after its last example."""

    def __init__(self, source: Source, shards: Sequence[int]) -> None:
        self._source = source
        self._shards = list(shards)

    @property
    def num_shards(self) -> int:
        """Number of shards to read."""
        return len(self._shards)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source."""
        return self._source.fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the source's name for a shard."""
        return self._source.shard_name(self._shards[shard])

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples with the number of their shard, then the mark."""
        number = self._shards[shard]
        for example, next_offset in self._source.read(number, offset=offset, index=index):
            if isinstance(example, BadExampleError):
                yield example, next_offset
            else:
                yield {**example, _SHARD: number}, next_offset
        yield {"__key__": "", _SHARD: number, _END: True}, 0


def _prepared(view: ScoreView, example: Example) -> tuple[int, Row | None]:
    """Returns the shard of an example and its row; None for the row of a mark."""
    shard = example.pop(_SHARD)
    return shard, None if _END in example else view(example)


def _collate(items: list[tuple[int, Row | None]]) -> list[tuple[int, int, Columns | None]]:
    """Returns shard, number of items and stacked rows of each run; None for the rows of a mark."""
    # Items of shards 4, 4, the mark of 4, 7 become (4, 2, rows), (4, 1, None), (7, 1, rows).
    slices: list[tuple[int, int, Columns | None]] = []
    for (shard, is_mark), run in groupby(items, key=lambda item: (item[0], item[1] is None)):
        rows = [row or {} for _, row in run]
        slices.append((shard, len(rows), None if is_mark else collate(rows)))
    return slices
