"""Deals shards to lanes, the fixed logical streams, and reads a lane.

In: a source and the number of lanes. Out: per lane, an endless stream of examples and cursors. The
deal depends on the seed and the number of lanes alone: any number of ranks and worker processes
reads the same streams. `num_lanes`, `lane_shards` and `shard_order` are pure; a `Lane` remembers
its place and owns at most one open shard. Runs where lanes are read, here or in a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from jest_stream.errors import BadExampleError, ConfigError, ShardError
from jest_stream.randomness import permutation
from jest_stream.types import Cursor, Example, Source

_MAX_LANES = 64  # by default; more interleave more shards, and hold as many files open


def num_lanes(
    num_shards: int,
    global_super_batch_size: int,
    world_size: int,
    requested: int | None = None,
) -> int:
    """Returns the number of lanes that the shards are dealt to.

    By default it is the largest divisor of the global super-batch up to `min(num_shards, 64)`, or
    up to `world_size` if that is more, that the world size divides: then every super-batch takes
    equally many examples of each lane, for any number of ranks that divides the lanes. Where that
    would leave more than half of the possible lanes unused, it is all of those.

    Args:
      num_shards: shards of the source; each lane needs one.
      global_super_batch_size: candidates per step over all ranks.
      world_size: number of ranks.
      requested: the user's number instead; checked.

    Raises:
      ConfigError: if there are too few shards for the ranks, or `requested` does not fit.
    """
    if num_shards < world_size:
        raise ConfigError(
            f"{world_size} ranks need at least {world_size} shards, one each, got {num_shards}. "
            "Split the data into more shards, or train on fewer ranks."
        )
    fitting = [
        number
        for number in range(world_size, num_shards + 1, world_size)
        if global_super_batch_size % number == 0
    ]
    if requested is not None:
        if requested not in fitting:
            raise ConfigError(
                f"lanes={requested} does not fit: it must be at most the {num_shards} shards, a "
                f"multiple of the {world_size} ranks and a divisor of the global super-batch of "
                f"{global_super_batch_size} examples. Fitting values: {_some(fitting)}."
            )
        return requested
    # 1,280 candidates, 2 ranks and 100 shards: at most 64 lanes, and 64 divides 1,280: 64 lanes.
    # 1,280 candidates, 2 ranks and 50 shards: at most 50, the largest divisor is 40: 40 lanes.
    # 107 candidates, 1 rank and 50 shards: at most 50, but only 1 divides a prime: 50 lanes. Super-
    # batches take unequal numbers of the lanes then, but mixing shards matters more.
    most = min(num_shards, _MAX_LANES, global_super_batch_size)
    most = max(most // world_size, 1) * world_size  # equally many for each rank, and at least one
    largest = max([number for number in fitting if number <= most], default=0)
    return largest if 2 * largest > most else most


def lane_shards(num_shards: int, num_lanes: int, lane: int, seed: int) -> list[int]:
    """Returns the shards that a lane owns: dealt once per run, like shuffled cards.

    Seven shards shuffled to 4 0 6 2 5 1 3 are dealt to three lanes as (4, 2, 3), (0, 5), (6, 1).
    """
    return permutation(num_shards, "deal", seed)[lane::num_lanes]


def shard_order(shards: list[int], lane: int, seed: int, epoch: int) -> list[int]:
    """Returns a lane's shards in the order of one epoch."""
    return [shards[i] for i in permutation(len(shards), "lane", seed, lane, epoch)]


class Lane(Iterator[tuple[Example | BadExampleError | ShardError, Cursor]]):
    """Iterates over one lane from a cursor on, epoch after epoch.

    Each example comes with the cursor of the next one. An example that cannot be used comes as its
    error, as in `Source.read`, and so does a shard whose rest is left out. After an exception the
    next call reads on at the cursor, where it failed.

    Args:
      source: where the shards are.
      lane: number of the lane, below `num_lanes`.
      seed: of the deal and the orders.
      cursor: where to go on.
      end_epoch: the epoch not to begin; None for an endless lane.
      on_bad_shard: `"skip"` leaves out the rest of a shard that raises a `ShardError`, until the
        next epoch; no other error is ever passed over.
      note: called before each example is read, with its shard and the number of the shard's
        examples before it.
    """

    def __init__(
        self,
        source: Source,
        *,
        lane: int,
        num_lanes: int,
        seed: int,
        cursor: Cursor,
        end_epoch: int | None = None,
        on_bad_shard: Literal["raise", "skip"] = "raise",
        note: Callable[[int, int], None] | None = None,
    ) -> None:
        self._source = source
        self._lane = lane
        self._seed = seed
        self._shards = lane_shards(source.num_shards, num_lanes, lane, seed)
        self._end_epoch = end_epoch
        self._on_bad_shard = on_bad_shard
        self._note = note
        self._cursor = cursor
        self._order = shard_order(self._shards, lane, seed, cursor.epoch)
        # Whether this epoch has given an example. One that was begun elsewhere may have given some.
        self._has_given = cursor[1:] != (0, 0, 0)
        self._skipped: ShardError | None = None  # the last one of this epoch
        self._reading: Iterator[tuple[Example | BadExampleError, int]] | None = None

    @property
    def cursor(self) -> Cursor:
        """The place where this lane goes on."""
        return self._cursor

    def __next__(self) -> tuple[Example | BadExampleError | ShardError, Cursor]:
        """Returns the next example and the cursor of the one after it.

        Raises:
          StopIteration: at `end_epoch`.
          ShardError: if a whole epoch held no example: the lane would spin for ever.
        """
        while self._end_epoch is None or self._cursor.epoch < self._end_epoch:
            # Five cases, of which the last two give nothing and look again:
            # 1. An example: the cursor moves to the next one of the shard.
            # 2. A shard that cannot be read, and skipping: its error, and on to the next shard.
            # 3. Any other error: raised, and the cursor stays.
            # 4. The end of a shard: on to the next one.
            # 5. The end of the last shard: on to the next epoch.
            epoch, position, offset, index = self._cursor
            if position == len(self._order):
                self._begin(epoch + 1)
                continue
            shard = self._order[position]
            if self._note is not None:
                self._note(shard, index)
            try:
                if self._reading is None:
                    self._reading = self._source.read(shard, offset=offset, index=index)
                step = next(self._reading, None)
            except ShardError as error:
                self.close()
                if self._on_bad_shard == "raise":
                    raise
                self._skipped = error.with_traceback(None)
                self._cursor = Cursor(epoch, position + 1, 0, 0)
                return error, self._cursor
            except BaseException:
                self.close()  # a failed generator looks like one that has ended
                raise
            if step is not None:
                # After example 7 of the shard that stands third in epoch 2: Cursor(2, 2, offset of
                # example 8, 8).
                self._cursor = Cursor(epoch, position, step[1], index + 1)
                self._has_given = True
                return step[0], self._cursor
            self._reading = None
            self._cursor = Cursor(epoch, position + 1, 0, 0)
        raise StopIteration

    def close(self) -> None:
        """Closes the open shard."""
        reading, self._reading = self._reading, None
        # Looked up by name: at interpreter exit the classes of this module may be gone.
        close = getattr(reading, "close", None)
        if close is not None:
            close()

    def _begin(self, epoch: int) -> None:
        """Begins an epoch; raises `ShardError` if the one before gave no example."""
        if not self._has_given:
            name = self._source.shard_name(self._order[0])
            more = ", ..." if len(self._order) > 1 else ""
            shards = f"{len(self._order)} shards ({name!r}{more})"
            if self._skipped is not None:
                raise ShardError(
                    f"lane {self._lane} gave no example in a whole epoch: on_bad_shard='skip' left "
                    f"out all of its {shards}, the last because: {self._skipped}",
                    shard=self._skipped.shard,
                    offset=self._skipped.offset,
                ) from self._skipped
            raise ShardError(
                f"lane {self._lane} holds no example in all of its {shards}: members must be named "
                "KEY.EXTENSION, such as 0001.jpg and 0001.txt.",
                shard=name,
            )
        self._order = shard_order(self._shards, self._lane, self._seed, epoch)
        self._cursor = Cursor(epoch, 0, 0, 0)
        self._has_given, self._skipped = False, None


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[-8:])) or "none"
    return f"..., {shown}" if len(numbers) > 8 else shown
