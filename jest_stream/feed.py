"""Super-batches from any place of the stream on: opens lanes when first needed, closes them again.

In: a position and the lanes of a rank. Out: super-batches, in order. Runs in the training thread;
the reader below it owns the worker processes.
"""

from __future__ import annotations

from jest_stream.config import StreamConfig
from jest_stream.scoring.streams import Slot
from jest_stream.sizes import Layout, Sizes
from jest_stream.sources.workers import BlockReader
from jest_stream.superbatch import Position, SuperBatch, Window
from jest_stream.types import Source
from jest_stream.views import ScoreView, collate

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
