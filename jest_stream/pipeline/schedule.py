"""The schedule: which super-batch is read, scored and handed out at which step, and its state.

The call that hands out batch t also scores super-batch t + lookahead, with the learner's weights
as they are at that call. The same on every device: what a CPU test sees is what a GPU does.
Runs in the training thread; only the reader below it may own processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from jest_stream.config import Layout, Sizes, StreamConfig
from jest_stream.errors import ConfigError, NonFiniteError, ResumeMismatchError
from jest_stream.metrics import Metrics
from jest_stream.pipeline.batches import Batches, Ledger
from jest_stream.pipeline.device import Ring
from jest_stream.pipeline.embedder import Embedder
from jest_stream.pipeline.epochs import PassLength, shard_counts
from jest_stream.pipeline.selector import Selector
from jest_stream.pipeline.state import (
    Progress,
    Record,
    Standing,
    all_cursors,
    deal,
    lanes_to_resume,
    read_record,
    record_of,
    state_of,
)
from jest_stream.pipeline.super_batches import Feed, Position, Scored, SuperBatch
from jest_stream.randomness import derive_seed
from jest_stream.types import Cursor, Source
from jest_stream.views import Columns, ScoreView


class Pipeline:
    """Reads, scores and hands out, step by step. Owns the feed and the queue."""

    def __init__(
        self,
        config: StreamConfig,
        sizes: Sizes,
        *,
        source: Source,
        layout: Layout,
        score_view: ScoreView,
        batches: Batches,
        embedder: Embedder,
        selector: Selector,
        metrics: Metrics,
        devices: Callable[[], tuple[torch.device, torch.device]],
    ) -> None:
        self._config = config
        self._ahead = config.lookahead
        self._sizes = sizes
        self._source = source
        self._batches = batches
        self._embedder = embedder
        self._selector = selector
        self._metrics = metrics
        self._ledger = Ledger(metrics)
        self._devices = devices  # asked when reading begins: models may be moved until then
        self._device = torch.device("cpu")
        self._ring = Ring(self._device)  # of the scoring device
        # By rank, since each rank chooses among candidates of its own.
        self._key = derive_seed("selection", config.seed, layout.rank)
        self._feed = Feed(config, sizes, source=source, layout=layout, prepare=score_view)
        self._error: Exception | None = None  # waits until the batches before it are handed out
        # With repeat=False on several ranks: where the pass ends on all of them.
        self._pass = PassLength.of(source, config, sizes, layout.world_size)
        self.at = Standing()
        """Where the run is."""
        self._begin_pass(0)

    def next_batch(self) -> Columns | None:
        """Returns the next sub-batch as columns on the training device; None at a pass's end.

        An error leaves in flight what was chosen. Ctrl-C, wherever it comes, undoes the call.
        """
        before = self.at.copy(), self._feed.position, self._metrics.state_dict()
        try:
            return self._next_batch()
        except Exception:
            raise
        except BaseException:
            self.at, position, counters = before
            self._feed.go_to(position)
            self._batches.forget()
            self._metrics.load_state_dict(counters)
            self._error = None  # is met again
            raise

    def _next_batch(self) -> Columns | None:
        # Whatever mode the caller is in: tensors made in inference mode cannot be trained on.
        with torch.inference_mode(False), torch.no_grad():
            self._batches.open()
            self._start_views()  # of former calls, as far as their choice has come
            self._fill()
            if not self.at.in_flight:
                self._end_pass()
                return None
            # Only now, with all that is next queued, may the host wait for a choice.
            self._start_views(num_awaited=len(self.at.in_flight) - 1)
            batch = self._hand_out(self.at.in_flight[0])
        self._ledger.book(self.at.in_flight.popleft(), batch, step=self.at.step)
        self.at.step += 1
        self.at.epoch_step += 1
        self.at.is_resumed, self.at.has_begun = False, True
        if self.at.epoch_step == self._config.steps_per_epoch:
            self.at.epoch_step = 0
        elif self.at.epoch_step == self.at.epoch_batches:
            self._end_pass()
        return batch

    def num_batches(self) -> int | None:
        """Returns the batches of an epoch, at the sizes that hold now; None if nobody knows."""
        config = self._config
        if config.steps_per_epoch is not None or config.repeat or config.skips:
            return config.steps_per_epoch
        if self.at.epoch_batches is not None:
            return self.at.epoch_batches
        counts = shard_counts(self._source)
        if counts is None:
            return None
        return self._sizes.num_batches(sum(counts), first_step=self.at.step - self.at.epoch_step)

    def begin_epoch(self) -> None:
        """Starts the next epoch: with `repeat=False` the next pass, else the stream goes on."""
        self.at.epoch_step = 0
        if not self._config.repeat:
            self._begin_pass(self.at.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch, unless the stream is there already; see `JESTDataset.set_epoch`."""
        if not self._config.repeat:
            is_there = epoch == self.at.epoch and (self.at.epoch_step == 0 or self.at.is_resumed)
            if not is_there:
                self._begin_pass(epoch)
        elif not self.at.has_begun:
            self.at.step = epoch * (self._config.steps_per_epoch or 0)
            self._go_to(self._start_of(epoch), restored=[])

    def price(self) -> None:
        """Measures what the models' forward passes cost, as far as that is not known."""
        self._embedder.price()

    def refresh(self) -> None:
        """Copies the learner's weights now."""
        self._place()
        self._embedder.refresh(self.at.step, force=True)

    def describe(self) -> str:
        """Returns the live state, for `repr`."""
        parts = [f"step {self.at.step}", f"{len(self.at.in_flight)} super-batches in flight"]
        if self._embedder.weights_step is not None:
            parts.append(f"learner copy {self.at.step - self._embedder.weights_step} steps old")
        return " | ".join(parts)

    def pause(self) -> None:
        """Stops workers and closes files. The next call goes on where this one stopped."""
        self._feed.pause()
        self._batches.pause()

    def close(self) -> None:
        """Stops workers, closes files, lets go of examples and models; `state_dict` still works."""
        self._error = None  # its traceback holds this, and all frames up to the user's loop
        self._feed.go_to(self._feed.position)
        self._batches.forget()
        for scored in self.at.in_flight:
            scored.choice.on_host()  # for `state_dict`
            scored.super_batch.columns.clear()
            scored.super_batch.on_host.clear()
        self._ring.close()
        self._embedder.close()

    def _start_of(self, epoch: int) -> Position:
        return Position({lane: Cursor(epoch, 0, 0, 0) for lane in self._feed.layout.lanes}, 0)

    def _begin_pass(self, epoch: int) -> None:
        """Goes to the start of a pass; what was in flight of another is counted as abandoned."""
        lost = [scored.super_batch for scored in self.at.in_flight]
        for super_batch in lost if self.at.tail is None else [*lost, self.at.tail]:
            self._metrics.count("epoch_abandoned", super_batch.size)
            self._ledger.book_skipped(super_batch)
        self._metrics.count("epoch_abandoned", sum(size for size, *_ in self.at.restored))
        self.at.epoch, self.at.epoch_step = epoch, 0
        self._go_to(self._start_of(epoch), restored=[])
        if self._pass is not None:
            self.at.epoch_batches = self._pass.batches_from_start(
                self._feed.layout, epoch=epoch, step=self.at.step
            )

    def _fill(self) -> None:
        """Reads and scores until `lookahead` super-batches wait behind the one to hand out.

        An error waits until the batches before it are handed out. The next call then reads the
        failed super-batch again.
        """
        while self._error is None and self.at.tail is None:
            restored = self.at.restored[0] if self.at.restored else None
            num_ready = len(self.at.in_flight)
            is_full = restored is None and num_ready > self._lookahead()
            if is_full or self.at.epoch_step + num_ready == self.at.epoch_batches:
                return
            start = self._feed.position
            try:
                scored = self._restore(restored) if restored else self._score_next()
            except Exception as error:
                self._feed.go_to(start)
                self._error = error
            else:
                if scored is not None:
                    self.at.in_flight.append(scored)
                    del self.at.restored[:1]
                    self._start_views()
        if self._error is not None and not self.at.in_flight:
            due, self._error = self._error, None
            try:
                raise due
            finally:
                del due  # its traceback holds this frame, and those up to the user's loop

    def _start_views(self, *, num_awaited: int = 0) -> None:
        """Has the train views made of what is in flight, where the choice has come or is awaited.

        Args:
          num_awaited: for how many of the choices to wait; the next ones to hand out come first.
        """
        for number, scored in enumerate(self.at.in_flight):
            if number < num_awaited or scored.choice.is_known():
                self._batches.start(scored.super_batch, scored.choice, step=self.at.step + number)

    def _lookahead(self) -> int:
        """Returns how many super-batches are scored ahead, settled when it is first asked."""
        if self._ahead is None:
            self._ahead = self._batches.lookahead(self._devices()[1])
        return self._ahead

    def _score_next(self) -> Scored | None:
        step, batch_size = self.at.step + len(self.at.in_flight), self._sizes.batch_size
        super_batch = self._read(self._sizes.at(step))
        if super_batch.size < batch_size:
            if self.at.epoch_batches is not None:
                raise ConfigError(
                    f"the shards of this rank hold fewer examples than source.num_examples says: "
                    f"{self.at.epoch_batches} batches were promised for this pass, and the data "
                    f"ended after {step - self.at.step + self.at.epoch_step}. Correct the counts."
                )
            self.at.tail = super_batch
            self._feed.go_to(super_batch.start)  # a checkpoint taken now finds the same tail
            return None
        choice, weights_step = self._selector.choose(
            super_batch.columns,
            slot=super_batch.slot,
            size=super_batch.size,
            batch_size=batch_size,
            key=self._key,
            step=step,
            now=self.at.step,
        )
        return Scored(super_batch=super_batch, choice=choice, weights_step=weights_step)

    def _restore(self, record: Record) -> Scored:
        """Reads a super-batch of a checkpoint again; its choice is known."""
        size, weights_step, selection = read_record(record, torch.device("cpu"))
        super_batch = self._read(size)
        if super_batch.size != size:
            raise ResumeMismatchError(
                f"the checkpoint holds a super-batch of {size} examples in flight, but "
                f"the shards have {super_batch.size} left there. "
                f"They have changed since; start anew, or resume from the same data."
            )
        choice = self._selector.restore(
            super_batch.columns, slot=super_batch.slot, selection=selection
        )
        return Scored(super_batch=super_batch, choice=choice, weights_step=weights_step)

    def _read(self, size: int) -> SuperBatch:
        with self._metrics.timed("data"):
            if not self._feed.is_open:
                self._place()
            end_epoch = None if self._config.repeat else self.at.epoch + 1
            slot = self._ring.slot(in_use=[each.super_batch.slot for each in self.at.in_flight])
            return self._feed.take(size, slot=slot, end_epoch=end_epoch)

    def _place(self) -> None:
        self._device, scoring_device = self._devices()
        if scoring_device != self._ring.device:
            self._ring.drain()
            self._ring = Ring(scoring_device)
        self._embedder.ring = self._ring

    def _go_to(self, position: Position, *, restored: list[Record]) -> None:
        """Forgets what is in flight; reading goes on at `position`."""
        self._feed.go_to(position)
        self._batches.forget()
        self.at.in_flight.clear()
        self.at.restored, self._error, self.at.tail = restored, None, None

    def _hand_out(self, scored: Scored) -> Columns:
        """Returns the chosen rows, gathered on the stream that the training loop uses."""
        super_batch, choice = scored.super_batch, scored.choice
        if not choice.on_host().is_finite:  # on a CPU it raised when scoring
            self._go_to(super_batch.start, restored=[])  # to be chosen from again
            raise NonFiniteError(
                f"scoring for step {self.at.step} gave NaN or infinity. Check the learner (has "
                f"training diverged?), the reference and the autocast dtype."
            )
        with self._metrics.timed("yielding"), super_batch.slot.handing_out():
            return self._batches.make(super_batch, choice, step=self.at.step, device=self._device)

    def _end_pass(self) -> None:
        """Books what is left at the end of a pass: fewer examples than make a sub-batch."""
        at = self.at
        if at.tail is not None:
            if at.epoch_step == 0:
                raise ConfigError(
                    f"batch_size={self._sizes.batch_size}, but a whole pass over the data gives "
                    f"this rank {at.tail.size} examples. Use a smaller batch_size, more data, "
                    f"or repeat=True."
                )
            self._metrics.count("epoch_tail", at.tail.size)
            self._ledger.book_skipped(at.tail)
            at.tail = None
        elif self._pass is not None:
            left = self._pass.num_left(self._feed.position.cursors, self._feed.layout, at.epoch)
            self._metrics.count("epoch_tail", left)
        self.begin_epoch()

    def state_dict(self, *, include_learner_copy: bool) -> dict[str, Any]:
        """Returns what describes the last batch handed out: no samples, no open files."""
        at = self.at
        in_flight = [
            record_of(scored.super_batch.size, scored.weights_step, scored.choice.on_host())
            for scored in at.in_flight
        ]
        progress = Progress(
            step=at.step,
            epoch=at.epoch,
            epoch_step=at.epoch_step,
            epoch_batches=at.epoch_batches,
            position=at.in_flight[0].super_batch.start if in_flight else self._feed.position,
            in_flight=[*in_flight, *at.restored],
            counters=self._metrics.state_dict(),
        )
        copy = self._embedder.copy_state() if include_learner_copy else None
        settings = self._settings(self._feed.layout.num_lanes, self._lookahead())
        return state_of(progress, settings, self._feed.layout, copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place of a checkpoint, without reading yet.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        settings = self._settings(self._config.lanes, self._config.lookahead)
        num_lanes = lanes_to_resume(state, settings)
        layout = replace(self._feed.layout, num_lanes=num_lanes)
        progress = deal(state, layout)
        epoch_batches = progress.epoch_batches
        if self._pass is not None and epoch_batches is None:  # other ranks: they end elsewhere
            epoch_batches = progress.epoch_step + self._pass.batches_left(
                all_cursors(state), layout, epoch=progress.epoch, step=progress.step
            )
        self._go_to(progress.position, restored=progress.in_flight)
        self._feed.layout = layout
        self._ahead = state["layout"]["lookahead"]
        self.at.step, self.at.epoch = progress.step, progress.epoch
        # An epoch may have another length by now.
        self.at.epoch_step = progress.epoch_step % (self._config.steps_per_epoch or sys.maxsize)
        self.at.epoch_batches = epoch_batches
        self.at.is_resumed = self.at.has_begun = True
        self._metrics.load_state_dict(progress.counters)
        self._embedder.load_copy_state(state["learner_copy"])

    def _settings(self, num_lanes: int | None, lookahead: int | None) -> dict[str, Any]:
        """Returns what must be the same where a checkpoint is loaded."""
        config = self._config
        return {
            "source": self._source.fingerprint,
            "num_shards": self._source.num_shards,
            "seed": config.seed,
            "lanes": num_lanes,
            "world_size": self._feed.layout.world_size,
            "batch_size": self._sizes.batch_size,
            "super_batch_size": [list(change) for change in self._sizes.changes],
            "lookahead": lookahead,
            "repeat": config.repeat,
            "quotas": self._selector.groups,
        }
