"""Makes blocks: examples of one lane that are prepared and handed over together.

In: a lane. Out: blocks of prepared examples, each with the cursor that follows it; bad examples and
bad shards are left out and named. Runs where lanes are read, in the training process or in a
worker. User code (`prepare`) runs on a random state that is named by the example: neither block
sizes nor processes change its draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jest_stream.errors import BadExampleError, BadExampleLimitError, ShardError, UserCodeError
from jest_stream.randomness import isolated_rng, seed_globally
from jest_stream.sources.lanes import Lane
from jest_stream.types import Cursor, Example, Source

# With 1 % of bad examples, 100 in a row come by chance once in 10**200.
_MAX_BAD_IN_A_ROW = 100


class SkippedShard(NamedTuple):
    """A shard whose rest was left out of an epoch."""

    shard: str
    """The name of the shard."""
    reason: str
    """A short name under which it is counted: `truncated`, `unavailable`, ..., or `damaged`."""
    message: str
    """Text of its error."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Up to `block_size` examples of one lane, in order."""

    lane: int
    items: Any
    """Result of `collate` for the examples; None if there are none."""
    cursors: Sequence[Cursor]
    """Per example, where its lane goes on after it."""
    skipped: Sequence[tuple[int, str]]
    """Bad examples: the number of good ones of this block before it, and the reason."""
    is_end: bool
    """Whether the lane has ended after this block."""
    skipped_shards: Sequence[tuple[int, SkippedShard]] = ()
    """Bad shards: the number of good examples of this block before it, and the shard."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of the source since the block before, in the process that read this one."""

    @property
    def num_examples(self) -> int:
        """Number of examples in the block."""
        return len(self.cursors)


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """Settings that all lanes of a `BlockReader` share, which explains them. Travels to workers."""

    source: Source
    num_lanes: int
    seed: int
    block_size: int
    prepare: Callable[[Example], Any]
    collate: Callable[[list[Any]], Any]
    end_epoch: int | None
    on_bad_example: Literal["raise", "skip"]
    on_bad_shard: Literal["raise", "skip"]


class LaneBlocks:
    """Reads one lane block by block. Owns its open shard.

    Args:
      settings: those of all lanes.
      lane: number of the lane.
      cursor: where it goes on.
      note: told the example that is being read; see `Lane`.
    """

    def __init__(
        self,
        settings: BlockSettings,
        lane: int,
        cursor: Cursor,
        *,
        note: Callable[[int, int], None] | None = None,
    ) -> None:
        self._settings = settings
        self._number = lane
        self._lane = Lane(
            settings.source,
            lane=lane,
            num_lanes=settings.num_lanes,
            seed=settings.seed,
            cursor=cursor,
            end_epoch=settings.end_epoch,
            on_bad_shard=settings.on_bad_shard,
            note=note,
        )
        self._num_bad_in_a_row = 0
        self._error: Exception | None = None  # waits until the examples before it are handed over

    def read(self) -> Block:
        """Returns the next block; shorter than the others at the end, or before an error.

        Raises:
          Exception: that of reading or preparing the next example, with its own type.
        """
        items: list[Any] = []
        cursors: list[Cursor] = []
        skipped: list[tuple[int, str]] = []
        skipped_shards: list[tuple[int, SkippedShard]] = []
        is_end = False
        # A block ends in one of three ways:
        # 1. It is full.
        # 2. The lane has ended: the block is marked as the last, and may be empty.
        # 3. An error: the examples read before it are handed over first, and the call after that
        #    raises it.
        with isolated_rng():
            while self._error is None and len(items) < self._settings.block_size:
                try:
                    step = self._next_good(skipped, skipped_shards, num_good=len(items))
                except Exception as error:
                    self._error = error
                    break
                if step is None:
                    is_end = True
                    break
                items.append(step[0])
                cursors.append(step[1])
            if self._error is not None and not items:
                failure, self._error = self._error, None
                try:
                    raise failure
                finally:
                    del failure  # its traceback holds this frame
            collated = self._settings.collate(items) if items else None
        return Block(
            lane=self._number,
            items=collated,
            cursors=cursors,
            skipped=skipped,
            is_end=is_end,
            skipped_shards=skipped_shards,
            counts=self._settings.source.take_counts(),
        )

    def close(self) -> None:
        """Closes the open shard and drops an error that waits, whose frames hold this object."""
        self._error = None
        self._lane.close()

    def _next_good(
        self,
        skipped: list[tuple[int, str]],
        skipped_shards: list[tuple[int, SkippedShard]],
        *,
        num_good: int,
    ) -> tuple[Any, Cursor] | None:
        """Returns the next example prepared, and its cursor; None at the end.

        Bad examples and shards on the way are added to `skipped` and `skipped_shards`.
        """
        # There are three cases: 1. a shard whose rest was left out. 2. An example that is bad, as
        # it was read or by `prepare`: left out, or raised. 3. A good one.
        for example, cursor in self._lane:
            if isinstance(example, ShardError):
                skip = SkippedShard(example.shard, _reason(example), str(example))
                skipped_shards.append((num_good, skip))
                continue
            try:
                if isinstance(example, BadExampleError):
                    raise example
                item = self._prepare(example, cursor)
            except BadExampleError as error:
                del example  # it may be the error, whose traceback holds this frame
                if self._settings.on_bad_example == "raise":
                    raise
                skipped.append((num_good, error.reason))
                self._num_bad_in_a_row += 1
                if self._num_bad_in_a_row == _MAX_BAD_IN_A_ROW:
                    raise BadExampleLimitError(
                        f"{_MAX_BAD_IN_A_ROW} bad examples in a row in lane {self._number}, the "
                        f"last one because: {error} So many point to a wrong setting or damaged "
                        'shards; on_bad_example="skip" is for single ones.'
                    ) from error
            else:
                self._num_bad_in_a_row = 0
                return item, cursor
        return None

    def _prepare(self, example: Example, cursor: Cursor) -> Any:
        seed_globally("prepare", self._settings.seed, self._number, *cursor)
        try:
            return self._settings.prepare(example)
        except StopIteration as error:  # would end the training loop in silence
            raise UserCodeError("a transform, tokenizer or key raised StopIteration") from error


def _reason(error: ShardError) -> str:
    """Returns `truncated` for `ShardTruncatedError`, and so on; `damaged` for `ShardError`."""
    name = type(error).__name__.removeprefix("Shard").removesuffix("Error")
    return name.lower() or "damaged"
