"""Examples of some shards, prepared to be embedded, with a mark where each shard ends.

In: a source and the shards to read. Out: groups of stacked rows of one shard, in its order, from
this process or from workers. What was left out is told with the shard that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jest_stream.config import as_integer, as_number, require_one_of
from jest_stream.errors import BadExampleError
from jest_stream.sources import Block, BlockReader
from jest_stream.types import Cursor, Example, Source
from jest_stream.views import Columns, ScoreView, collate

_BLOCK_SIZE = 64
_SHARD, _END = "__cached_shard__", "__end__"


class Group(NamedTuple):
    """Some examples of one shard, or the news that it has ended."""

    shard: int
    columns: Columns
    """Stacked; empty at the end of the shard."""
    num_read: list[int]
    """Per example, how many of the shard were read with it, unusable ones too; at the end of the
    shard one number: all."""
    skipped: list[tuple[int, str]]
    """What was left out: before which example of the group, and why."""
    is_end: bool


@dataclass(frozen=True)
class ReadSettings:
    """How examples are read; `JESTDataset` explains the fields."""

    num_workers: int
    on_bad_example: Literal["raise", "skip"]
    max_bad_fraction: float
    timeout_s: float

    def __post_init__(self) -> None:
        as_integer("num_workers", self.num_workers, 0)
        require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        as_number("max_bad_fraction", self.max_bad_fraction)
        as_number("timeout_s", self.timeout_s)


def read_groups(
    source: Source, shards: Sequence[int], *, start: int, view: ScoreView, settings: ReadSettings
) -> Iterator[Group]:
    """Yields the examples of some shards, those of a shard in order.

    Args:
      source: where they are.
      shards: which, at least one.
      start: examples to pass over in each; for a source of one shard.
      view: makes a row of an example.
      settings: how to read.
    """
    num_lanes = max(1, min(settings.num_workers, len(shards)))
    reader = BlockReader(
        _Marked(source, shards),
        lanes=range(num_lanes),
        num_lanes=num_lanes,
        seed=0,
        cursors={lane: Cursor(0, 0, 0, start) for lane in range(num_lanes)},
        block_size=_BLOCK_SIZE,
        prepare=_Prepare(view),
        collate=_collate,
        end_epoch=1,
        on_bad_example=settings.on_bad_example,
        max_bad_fraction=settings.max_bad_fraction,
        num_workers=settings.num_workers,
        timeout_s=settings.timeout_s,
    )
    late: dict[int, list[str]] = {}  # by lane: left out behind the last example of a block
    try:
        while (block := reader.read()) is not None:
            yield from _groups(block, late)
    finally:
        reader.close()


def _groups(block: Block, late: dict[int, list[str]]) -> Iterator[Group]:
    """Yields the groups of a block, with what was left out of each shard."""
    skipped = [(0, reason) for reason in late.pop(block.lane, [])] + list(block.skipped)
    first = 0
    for shard, size, columns in block.items or ():
        is_end = columns is None
        cursors = block.cursors[first : first + size]
        yield Group(
            shard,
            columns or {},
            # The mark of the end was counted as an example, too.
            [cursor.num_before - is_end for cursor in cursors],
            [(at - first, reason) for at, reason in skipped if first <= at < first + size],
            is_end,
        )
        first += size
    late[block.lane] = [reason for at, reason in skipped if at >= first]


class _Marked(Source):
    """Some shards of a source, each with a mark behind its last example."""

    def __init__(self, source: Source, shards: Sequence[int]) -> None:
        self._source = source
        self._shards = list(shards)

    @property
    def num_shards(self) -> int:
        """How many there are."""
        return len(self._shards)

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self._source.fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns what the source calls it."""
        return self._source.shard_name(self._shards[shard])

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples with the number of their shard, then the mark."""
        number = self._shards[shard]
        for example, behind in self._source.read(number, offset=offset, index=index):
            if isinstance(example, BadExampleError):
                yield example, behind
            else:
                yield {**example, _SHARD: number}, behind
        yield {"__key__": "", _SHARD: number, _END: True}, 0


class _Prepare:
    """Makes rows, and lets marks pass."""

    def __init__(self, view: ScoreView) -> None:
        self._view = view

    def __call__(self, example: Example) -> tuple[int, Any]:
        shard = example.pop(_SHARD)
        return shard, None if _END in example else self._view(example)


def _collate(items: list[tuple[int, Any]]) -> list[tuple[int, int, Columns | None]]:
    """Returns shard, number of items and stacked rows of each run; None for the rows of a mark."""
    groups: list[tuple[int, int, Columns | None]] = []
    rows: list[Any] = []
    for position, (shard, row) in enumerate(items):
        if row is None:
            groups.append((shard, 1, None))
            continue
        rows.append(row)
        following = items[position + 1] if position + 1 < len(items) else (None, None)
        if following[0] != shard or following[1] is None:
            groups.append((shard, len(rows), collate(rows)))
            rows = []
    return groups
