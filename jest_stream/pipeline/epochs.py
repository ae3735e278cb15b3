"""Computes how many batches a pass gives, from the number of examples in each shard.

With `repeat=False` lanes end with their data. Ranks own different lanes, and one may hold a batch
more than another; in a data-parallel run it would wait for the others for ever. Where the counts
are known, every rank computes the same end instead, without asking the others. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jest_stream.config import Layout, Sizes, StreamConfig, as_integer
from jest_stream.errors import ConfigError, ResumeMismatchError
from jest_stream.sources import lane_shards, shard_order
from jest_stream.types import Cursor, Source


def shard_counts(source: Source) -> list[int] | None:
    """Returns how many examples each shard holds; None if the source does not know of all.

    Raises:
      ConfigError: if the source's counts cannot be right.
    """
    counts: Sequence[int | None] | None = source.num_examples
    if counts is None or any(count is None for count in counts):
        return None
    if len(counts) != source.num_shards:
        raise ConfigError(
            f"source.num_examples has {len(counts)} entries for {source.num_shards} shards. It "
            f"must hold one number for each shard, or be None."
        )
    return [as_integer("each of source.num_examples", count, 0) for count in counts]


@dataclass(frozen=True, kw_only=True)
class PassLength:
    """Computes where passes end. For `repeat=False` on several ranks."""

    counts: list[int]
    """Examples of each shard."""
    sizes: Sizes
    """Of batches and super-batches."""
    seed: int
    """Of the deal and the orders."""

    @classmethod
    def of(
        cls, source: Source, config: StreamConfig, sizes: Sizes, world_size: int
    ) -> PassLength | None:
        """Returns the lengths that end passes evenly; None where each rank may end as it likes.

        Raises:
          ConfigError: if a pass could end on one rank while others wait for it.
        """
        if config.repeat or world_size == 1:
            return None
        counts = shard_counts(source)
        if counts is None:
            raise ConfigError(
                f"repeat=False on {world_size} ranks must end on all of them after the same number "
                f"of batches, but the source does not know how many examples its shards hold. Give "
                f"it the counts (a manifest, or num_examples of a source of your own), or use "
                f"steps_per_epoch with repeat=True."
            )
        if config.skips:
            raise ConfigError(
                f"repeat=False on {world_size} ranks must end on all of them after the same number "
                f"of batches, but on_bad_example={config.on_bad_example!r} and "
                f"on_bad_shard={config.on_bad_shard!r} leave out examples that nobody can count "
                f"beforehand. Use steps_per_epoch with repeat=True, or 'raise' for both."
            )
        return cls(counts=counts, sizes=sizes, seed=config.seed)

    def num_left(self, cursors: Mapping[int, Cursor], layout: Layout, epoch: int) -> int:
        """Returns how many examples of a pass lie after the cursors of some lanes."""
        left = 0
        for lane, cursor in cursors.items():
            if cursor.epoch > epoch:  # the lane has ended
                continue
            shards = lane_shards(len(self.counts), layout.num_lanes, lane, self.seed)
            order = shard_order(shards, lane, self.seed, epoch)
            # A lane of shards with 5, 4 and 6 examples, in its second shard after 3 of them, has
            # 4 + 6 - 3 = 7 left.
            left += sum(self.counts[shard] for shard in order[cursor.shard :]) - cursor.num_before
        return left

    def batches_left(
        self, cursors: Mapping[int, Cursor], layout: Layout, *, epoch: int, step: int
    ) -> int:
        """Returns how many more batches of a pass every rank can hand out.

        Args:
          cursors: of all lanes, where they go on.
          layout: the ranks that read them.
          epoch: the pass.
          step: the step of the next batch.

        Raises:
          ResumeMismatchError: if the cursors of some lanes are missing.
        """
        if len(cursors) < layout.num_lanes:
            raise ResumeMismatchError(
                f"the checkpoint holds {len(cursors)} of {layout.num_lanes} lanes; where a pass "
                f"ends on other ranks than before depends on all of them. Load the state that "
                f"gather_state_dict made."
            )
        # The rank that has the fewest decides for all: the others leave out the rest.
        return min(
            self.sizes.num_batches(
                self.num_left(
                    {lane: cursors[lane] for lane in layout.lanes_of(rank)}, layout, epoch
                ),
                first_step=step,
            )
            for rank in range(layout.world_size)
        )

    def batches_from_start(self, layout: Layout, *, epoch: int, step: int) -> int:
        """Returns how many batches a whole pass gives every rank: at least one.

        Raises:
          ConfigError: if it gives none.
        """
        cursors = {lane: Cursor(epoch, 0, 0, 0) for lane in range(layout.num_lanes)}
        batches = self.batches_left(cursors, layout, epoch=epoch, step=step)
        if batches == 0:
            raise ConfigError(
                f"batch_size={self.sizes.batch_size}, but a whole pass over {sum(self.counts)} "
                f"examples in {len(self.counts)} shards gives one of the {layout.world_size} ranks "
                f"fewer. Use a smaller batch_size, more data, or repeat=True."
            )
        return batches
