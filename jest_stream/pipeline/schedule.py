"""Decides which super-batch is read, scored and handed out at each step, and keeps their state.

The call that hands out batch t also scores super-batch t + lookahead, with the learner's weights as
they are at that call. The order is the same on every device: a test on the CPU sees the one that a
GPU follows. Runs in the training thread; only the super-batch reader and late views may own
processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jest_stream.config import Layout, Sizes, StreamConfig
from jest_stream.errors import ConfigError, NonFiniteError, ResumeMismatchError
from jest_stream.metrics import Metrics
from jest_stream.pipeline.batches import Batches, book, book_skipped
from jest_stream.pipeline.epochs import PassLength, shard_counts
from jest_stream.pipeline.selector import Selector
from jest_stream.pipeline.state import (
    Record,
    RunState,
    all_cursors,
    checkpoint_of,
    counters_of,
    layout_to_resume,
    position_of,
    read_record,
    run_of,
    upgraded,
)
from jest_stream.pipeline.super_batches import (
    Position,
    ScoredSuperBatch,
    SuperBatch,
    SuperBatchReader,
)
from jest_stream.types import Example, Source
from jest_stream.views import Columns


class Pipeline:
    """Reads, scores and hands out, step by step. Owns the reader and the super-batches in flight.

    Args:
      config: how to read, and how far ahead to score.
      sizes: of batches and super-batches.
      source: where the shards are.
      layout: the lanes and ranks of the run; a checkpoint may bring other lanes.
      score_view: makes the rows that are scored.
      batches: makes batches of selected rows.
      selector: scores and selects.
      metrics: where all of it is counted.
      devices: returns the devices of batches and of scoring. Asked when reading begins: models may
        be moved until then.
    """

    def __init__(
        self,
        config: StreamConfig,
        sizes: Sizes,
        *,
        source: Source,
        layout: Layout,
        score_view: Callable[[Example], dict[str, Any]],
        batches: Batches,
        selector: Selector,
        metrics: Metrics,
        devices: Callable[[], tuple[torch.device, torch.device]],
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._source = source
        self._batches = batches
        self._selector = selector
        self._metrics = metrics
        self._devices = devices
        self._device = torch.device("cpu")  # where batches go
        self._ahead = config.lookahead
        self._reader = SuperBatchReader(
            config, sizes, source=source, layout=layout, prepare=score_view
        )
        self._error: Exception | None = None  # waits until the batches before it are handed out
        # With repeat=False on several ranks: where the pass ends on all of them.
        self._pass = PassLength.of(source, config, sizes, layout.world_size)
        self.run = RunState()
        self._begin_pass(0)

    def next_batch(self) -> Columns | None:
        """Returns the next sub-batch as columns on the training device; None at a pass's end.

        An error leaves the super-batches scored before it in flight. Ctrl-C, at any line, undoes
        the call: the next one reads, scores and returns the same.
        """
        before = self.run.copy(), self._reader.position, self._metrics.state_dict()
        try:
            return self._next_batch()
        except Exception:  # `_next_batch` has left the state as said above
            raise
        except BaseException:  # Ctrl-C may have come between any two of its lines
            self.run, position, counters = before
            self._reader.go_to(position)
            self._batches.forget()
            self._metrics.load_state_dict(counters)
            self._error = None  # reading meets it again
            raise

    def _next_batch(self) -> Columns | None:
        # In the caller's inference mode batches would be made that cannot be trained on.
        with torch.inference_mode(False), torch.no_grad():
            # 1. Train views of super-batches in flight begin, as far as their selection has come.
            self._batches.open()
            self._start_views()
            # 2. Super-batches are read and scored until `lookahead` follow the one to hand out.
            self._score_ahead()
            if not self.run.in_flight:
                self._end_pass()
                return None
            # 3. With all later work queued, the host may wait for selections: for all but the
            #    newest, whose scoring runs while the loop trains on the batch returned here.
            self._start_views(num_awaited=len(self.run.in_flight) - 1)
            # 4. The oldest super-batch's selection becomes the batch.
            batch = self._hand_out(self.run.in_flight[0])
        # 5. Only a batch that exists is counted.
        book(self._metrics, self.run.in_flight.popleft(), batch, step=self.run.step)
        self.run.step += 1
        self.run.epoch_step += 1
        self.run.is_resumed, self.run.has_begun = False, True
        # 6. An epoch ends with its last batch, where its length is known; a pass of unknown length
        #    ends with the call after it, see 2.
        if self.run.epoch_step == self._config.steps_per_epoch:
            self.run.epoch_step = 0
        elif self.run.epoch_step == self.run.epoch_batches:
            self._end_pass()
        return batch

    def _start_views(self, *, num_awaited: int = 0) -> None:
        """Starts the train views of all super-batches in flight whose selection is known.

        Args:
          num_awaited: the number of selections to wait for, from the next to hand out on.
        """
        for number, scored in enumerate(self.run.in_flight):
            if number < num_awaited or scored.selection.is_known():
                self._batches.start(scored, step=self.run.step + number)

    def _score_ahead(self) -> None:
        """Reads and scores until `lookahead` super-batches follow the one to hand out.

        An error waits until the batches before it are handed out. The next call then reads the
        failed super-batch again.
        """
        run = self.run
        while self._error is None and run.tail is None:
            num_ready = len(run.in_flight)
            # There are three cases:
            # 1. A pass of known length ends with the super-batches in flight.
            if run.epoch_step + num_ready == run.epoch_batches:
                return
            # 2. A checkpoint had super-batches in flight: they come first, however many they are.
            # 3. Otherwise one more is scored, unless enough are in flight.
            if not run.to_restore and num_ready > self._lookahead():
                return
            position = self._reader.position
            try:
                scored = self._restore(run.to_restore[0]) if run.to_restore else self._score_next()
            except Exception as error:
                self._reader.go_to(position)
                self._error = error
            else:  # None at the end of a pass: `run.tail` is set, and ends this loop
                if scored is not None:
                    run.in_flight.append(scored)
                    del run.to_restore[:1]
                    self._start_views()
        if self._error is not None and not run.in_flight:
            due, self._error = self._error, None
            try:
                raise due
            finally:
                del due  # its traceback holds this frame, and those up to the user's loop

    def _score_next(self) -> ScoredSuperBatch | None:
        """Reads and scores the next super-batch; None where too few candidates are left."""
        run, batch_size = self.run, self._sizes.batch_size
        # At step 7 with 2 super-batches in flight, for steps 7 and 8, the next one is for step 9.
        step = run.step + len(run.in_flight)
        super_batch = self._read(self._sizes.at(step))
        if super_batch.size < batch_size:
            # Too few candidates: an error in a pass of known length, which stops before. Any other
            # pass ends here.
            if run.epoch_batches is not None:
                raise ConfigError(
                    f"the shards of this rank hold fewer examples than source.num_examples says: "
                    f"{run.epoch_batches} batches were promised for this pass, and the data "
                    f"ended after {step - run.step + run.epoch_step}. Correct the counts."
                )
            run.tail = super_batch
            self._reader.go_to(super_batch.position)  # a checkpoint taken now finds the same tail
            return None
        return self._selector.select(super_batch, batch_size=batch_size, step=step, now=run.step)

    def _restore(self, record: Record) -> ScoredSuperBatch:
        """Reads a super-batch of a checkpoint again; its selection is known."""
        size, weights_step, selection = read_record(record)
        super_batch = self._read(size)
        if super_batch.size != size:
            raise ResumeMismatchError(
                f"the checkpoint holds a super-batch of {size} examples in flight, but "
                f"the shards have {super_batch.size} left there. "
                f"They have changed since; start anew, or resume from the same data."
            )
        return self._selector.restore(super_batch, selection, weights_step)

    def _read(self, size: int) -> SuperBatch:
        with self._metrics.timed("data"):
            if not self._reader.is_open:
                self._place()
            end_epoch = None if self._config.repeat else self.run.epoch + 1
            slot = self._selector.slot(in_use=self.run.in_flight)
            return self._reader.read(size, slot=slot, end_epoch=end_epoch)

    def _hand_out(self, scored: ScoredSuperBatch) -> Columns:
        """Returns the selected rows, gathered on the stream that the training loop uses."""
        if not scored.selection.on_host().is_finite:  # on a CPU it raised when scoring
            self._go_to(scored.super_batch.position)  # to be selected from again
            raise NonFiniteError(
                f"scoring for step {self.run.step} gave NaN or infinity. Check the learner (has "
                f"training diverged?), the reference and the autocast dtype."
            )
        with self._metrics.timed("yielding"), scored.super_batch.slot.handing_out():
            return self._batches.make(scored, step=self.run.step, device=self._device)

    def _place(self) -> None:
        self._device, scoring_device = self._devices()
        self._selector.place(scoring_device)

    def _lookahead(self) -> int:
        """Returns how many super-batches are scored ahead, settled when it is first asked."""
        if self._ahead is None:
            self._ahead = self._batches.lookahead(self._devices()[1])
        return self._ahead

    def num_batches(self) -> int | None:
        """Returns the batches of an epoch, at the sizes that hold now; None if not known."""
        config, run = self._config, self.run
        # There are three cases:
        # 1. The user gave the number; without it the stream is endless, or skips hide its length.
        if config.steps_per_epoch is not None or config.repeat or config.skips:
            return config.steps_per_epoch
        # 2. The ranks computed a common end of this pass.
        if run.epoch_batches is not None:
            return run.epoch_batches
        # 3. One rank reads all shards, from the first step of this pass on.
        counts = shard_counts(self._source)
        if counts is None:
            return None
        return self._sizes.num_batches(sum(counts), first_step=run.step - run.epoch_step)

    def begin_epoch(self) -> None:
        """Starts the next epoch: with `repeat=False` the next pass, else the stream goes on."""
        self.run.epoch_step = 0
        if not self._config.repeat:
            self._begin_pass(self.run.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch, unless the stream is there already; see `JESTDataset.set_epoch`."""
        run = self.run
        if not self._config.repeat:
            is_there = epoch == run.epoch and (run.epoch_step == 0 or run.is_resumed)
            if not is_there:
                self._begin_pass(epoch)
        elif not run.has_begun:
            run.step = epoch * (self._config.steps_per_epoch or 0)
            self._go_to(self._start_of(epoch))

    def _begin_pass(self, epoch: int) -> None:
        """Goes to the start of a pass; examples still in flight are counted as abandoned."""
        run = self.run
        lost = [scored.super_batch for scored in run.in_flight]
        for super_batch in lost if run.tail is None else [*lost, run.tail]:
            self._metrics.count("epoch_abandoned", super_batch.size)
            book_skipped(self._metrics, super_batch)
        self._metrics.count("epoch_abandoned", sum(size for size, *_ in run.to_restore))
        run.epoch, run.epoch_step = epoch, 0
        self._go_to(self._start_of(epoch))
        if self._pass is not None:
            run.epoch_batches = self._pass.batches_from_start(
                self._reader.layout, epoch=epoch, step=run.step
            )

    def _end_pass(self) -> None:
        """Counts the examples left at the end of a pass, then begins the next one."""
        run = self.run
        # There are two kinds of rest:
        # 1. Of a pass of unknown length: the candidates read last, too few for a sub-batch.
        # 2. Of a pass that ranks end together: the examples that this rank did not even read.
        if run.tail is not None:
            if run.epoch_step == 0:  # the loop would begin pass after pass, for ever
                raise ConfigError(
                    f"batch_size={self._sizes.batch_size}, but a whole pass over the data gives "
                    f"this rank {run.tail.size} examples. Use a smaller batch_size, more data, "
                    f"or repeat=True."
                )
            self._metrics.count("epoch_tail", run.tail.size)
            book_skipped(self._metrics, run.tail)
            run.tail = None
        elif self._pass is not None:
            cursors, layout = self._reader.position.cursors, self._reader.layout
            self._metrics.count("epoch_tail", self._pass.num_left(cursors, layout, run.epoch))
        self.begin_epoch()

    def _start_of(self, epoch: int) -> Position:
        return Position.of_epoch(epoch, self._reader.layout.lanes)

    def _go_to(self, position: Position) -> None:
        """Forgets the super-batches in flight; reading goes on at `position`."""
        self._reader.go_to(position)
        self._batches.forget()
        self.run.in_flight.clear()
        self.run.to_restore, self.run.tail, self._error = [], None, None

    def state_dict(self, *, include_learner_copy: bool) -> dict[str, Any]:
        """Returns a checkpoint taken after the last batch handed out. It holds no examples."""
        return checkpoint_of(
            self.run,
            self._reader.position,
            settings=self._settings(self._reader.layout.num_lanes, self._lookahead()),
            layout=self._reader.layout,
            counters=self._metrics.state_dict(),
            learner_copy=self._selector.state_dict() if include_learner_copy else None,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was taken, without reading yet.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        state = upgraded(state)
        settings = self._settings(self._config.lanes, self._config.lookahead)
        layout = layout_to_resume(state, settings, self._reader.layout.rank)
        run = run_of(state, layout)
        # On another number of ranks the pass ends elsewhere: computed from all lanes of the state.
        if self._pass is not None and run.epoch_batches is None:
            run.epoch_batches = run.epoch_step + self._pass.batches_left(
                all_cursors(state), layout, epoch=run.epoch, step=run.step
            )
        # An epoch may have another length by now: step 5 in epochs of 3 is their step 2.
        run.epoch_step %= self._config.steps_per_epoch or sys.maxsize
        # All checks have passed; nothing of this pipeline changes before this line.
        self._go_to(position_of(state, layout))
        self._reader.layout = layout
        self.run, self._ahead = run, state["settings"]["lookahead"]
        self._metrics.load_state_dict(counters_of(state, layout))
        self._selector.load_state_dict(state["learner_copy"])

    def _settings(self, num_lanes: int | None, lookahead: int | None) -> dict[str, Any]:
        """Returns the settings that must be the same where a checkpoint is loaded."""
        return {
            "source": self._source.fingerprint,
            "num_shards": self._source.num_shards,
            "seed": self._config.seed,
            "lanes": num_lanes,
            "world_size": self._reader.layout.world_size,
            "batch_size": self._sizes.batch_size,
            "super_batch_size": [list(change) for change in self._sizes.changes],
            "lookahead": lookahead,
            "repeat": self._config.repeat,
            "quotas": self._selector.groups,
        }

    def price(self) -> None:
        """Measures the cost of the models' forward passes, as far as it is not known."""
        self._selector.price()

    def refresh(self) -> None:
        """Copies the learner's weights now."""
        self._place()
        self._selector.refresh(self.run.step)

    def describe(self) -> str:
        """Returns the live state, for `repr`."""
        parts = [f"step {self.run.step}", f"{len(self.run.in_flight)} super-batches in flight"]
        if self._selector.weights_step is not None:
            parts.append(f"learner copy {self.run.step - self._selector.weights_step} steps old")
        return " | ".join(parts)

    def pause(self) -> None:
        """Stops workers and closes files. The next call goes on where this one stopped."""
        self._reader.pause()
        self._batches.pause()

    def close(self) -> None:
        """Stops workers, closes files, lets go of examples and models; `state_dict` still works."""
        self._error = None  # its traceback holds this, and all frames up to the user's loop
        self._reader.go_to(self._reader.position)
        self._batches.forget()
        for scored in self.run.in_flight:
            scored.selection.on_host()  # for `state_dict`
            scored.super_batch.columns.clear()
            scored.super_batch.on_host.clear()
        self._selector.close()
