"""The schedule: which super-batch is read, scored and handed out at which step, and its state.

The call that hands out batch t also scores super-batch t + lookahead, with the learner's weights
as they are at that call. The same on every device: what a CPU test sees is what a GPU does.
Runs in the training thread; only the reader below it may own processes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from jest_stream.config import StreamConfig
from jest_stream.errors import ConfigError, NonFiniteError, ResumeMismatchError
from jest_stream.randomness import derive_seed
from jest_stream.reporting.metrics import Metrics
from jest_stream.selector import Selector
from jest_stream.sizes import Sizes
from jest_stream.sources.workers import BlockReader
from jest_stream.superbatch import Position, SuperBatch, Window, moved, take_rows
from jest_stream.types import Cursor, Selection, Source
from jest_stream.views import Columns, ScoreView, TrainView, collate, columns_of, put_view

_VERSION = 1
_BLOCK_SIZE = 64  # examples of one lane handed over at once: more only adds latency


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the stream is laid out over lanes and ranks."""

    num_lanes: int
    rank: int
    world_size: int

    @property
    def lanes(self) -> list[int]:
        """The lanes of this rank."""
        return list(range(self.rank, self.num_lanes, self.world_size))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A super-batch in flight: chosen from, not yet handed out."""

    super_batch: SuperBatch
    selection: Selection
    weights_step: int | None
    """The step whose learner weights it was scored with; None without a learner."""


class Pipeline:
    """Reads, scores and hands out, step by step. Owns the reader, the window and the queue."""

    def __init__(
        self,
        config: StreamConfig,
        sizes: Sizes,
        *,
        source: Source,
        layout: Layout,
        score_view: ScoreView,
        train_view: TrainView | None,
        selector: Selector,
        metrics: Metrics,
        devices: Callable[[], tuple[torch.device, torch.device]],
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._source = source
        self._layout = layout
        self._score_view = score_view
        self._train_view = train_view
        self._selector = selector
        self._metrics = metrics
        self._devices = devices  # asked when reading begins: models may be moved until then
        self._device = self._scoring_device = torch.device("cpu")
        # By rank, since each rank chooses among candidates of its own.
        self._key = derive_seed("selection", config.seed, layout.rank)
        self._reader: BlockReader | None = None
        self._window: Window | None = None
        self._in_flight: deque[Scored] = deque()
        self._restored: list[Mapping[str, Any]] = []  # of a checkpoint, not yet read again
        self._error: Exception | None = None  # waits until the batches before it are handed out
        self._start = self._start_of(0)
        self._tail: SuperBatch | None = None  # too small for a batch: where a pass has ended
        self.epoch = 0
        """Passes begun before this one, where `repeat=False`."""
        self.epoch_step = 0
        """Batches handed out in this epoch; 0 again as soon as it is complete."""
        self.is_resumed = False
        """Whether a checkpoint was loaded and nothing handed out since."""
        self.step = 0
        """Batches handed out."""

    def next_batch(self) -> Columns | None:
        """Returns the next sub-batch as columns on the training device; None at a pass's end."""
        # Whatever mode the caller is in: tensors made in inference mode cannot be trained on.
        with torch.inference_mode(False), torch.no_grad():
            self._fill()
            if not self._in_flight:
                self._end_pass()
                return None
            batch = self._hand_out(self._in_flight[0])
        self._count(self._in_flight.popleft())
        self.step += 1
        self.epoch_step += 1
        if self.epoch_step == self._config.steps_per_epoch:
            self.epoch_step = 0
        self.is_resumed = False
        return batch

    def begin_epoch(self) -> None:
        """Starts the next epoch: with `repeat=False` the next pass, else the stream goes on."""
        self.epoch_step = 0
        if not self._config.repeat:
            self.epoch += 1
            self._go_to(self._start_of(self.epoch), restored=[])

    def refresh(self) -> None:
        """Copies the learner's weights now."""
        self._place()
        self._selector.refresh(self.step, force=True)

    def describe(self) -> str:
        """Returns the live state, for `repr`."""
        parts = [f"step {self.step}", f"{len(self._in_flight)} super-batches in flight"]
        if self._selector.weights_step is not None:
            parts.append(f"learner copy {self.step - self._selector.weights_step} steps old")
        return " | ".join(parts)

    def pause(self) -> None:
        """Stops workers and closes files. The next call goes on where this one stopped."""
        if self._reader is not None:
            self._reader.close()

    def close(self) -> None:
        """Stops workers, closes files, lets go of super-batches and models."""
        self._abandon(self._position)
        self._in_flight.clear()
        self._selector.close()

    def _start_of(self, epoch: int) -> Position:
        return Position({lane: Cursor(epoch, 0, 0, 0) for lane in self._layout.lanes}, 0)

    @property
    def _position(self) -> Position:
        """Where the next super-batch to be read starts."""
        return self._start if self._window is None else self._window.position

    def _fill(self) -> None:
        """Reads and scores until `lookahead` super-batches wait behind the one to hand out.

        An error waits until the batches before it are handed out. Nothing that was read is lost:
        the next call reads the failed super-batch again.
        """
        while self._error is None and self._tail is None:
            restored = self._restored[0] if self._restored else None
            if restored is None and len(self._in_flight) > self._config.lookahead:
                return
            start = self._position
            try:
                scored = self._restore(restored) if restored else self._score_next()
            except Exception as error:
                self._abandon(start)
                self._error = error
            except BaseException:
                self._abandon(start)
                raise
            else:
                if scored is not None:
                    self._in_flight.append(scored)
                    del self._restored[:1]
        if self._error is not None and not self._in_flight:
            due, self._error = self._error, None
            raise due

    def _score_next(self) -> Scored | None:
        step, batch_size = self.step + len(self._in_flight), self._sizes.batch_size
        super_batch = self._read(self._sizes.at(step))
        if super_batch.size < batch_size:
            self._tail = super_batch
            self._abandon(super_batch.start)  # a checkpoint taken now finds the same tail
            return None
        selection, weights_step = self._selector.choose(
            super_batch.columns,
            size=super_batch.size,
            batch_size=batch_size,
            key=self._key,
            step=step,
            now=self.step,
        )
        return Scored(super_batch=super_batch, selection=selection, weights_step=weights_step)

    def _restore(self, record: Mapping[str, Any]) -> Scored:
        """Reads a super-batch of a checkpoint again; its choice is known."""
        super_batch = self._read(record["size"])
        if super_batch.size != record["size"]:
            raise ResumeMismatchError(
                f"the checkpoint holds a super-batch of {record['size']} examples in flight, but "
                f"the shards have {super_batch.size} left there. "
                f"They have changed since; start anew, or resume from the same data."
            )
        return Scored(
            super_batch=super_batch,
            selection=Selection(
                **{k: v.to(self._scoring_device, copy=True) for k, v in record["selection"].items()}
            ),
            weights_step=record["weights_step"],
        )

    def _read(self, size: int) -> SuperBatch:
        with self._metrics.timed("data"):
            if self._window is None:
                self._open()
            assert self._window is not None
            return self._window.take(size, device=self._scoring_device)

    def _place(self) -> None:
        self._device, self._scoring_device = self._devices()
        self._selector.device = self._scoring_device

    def _open(self) -> None:
        config, start = self._config, self._start
        self._place()
        self._reader = BlockReader(
            self._source,
            lanes=self._layout.lanes,
            num_lanes=self._layout.num_lanes,
            seed=config.seed,
            cursors=start.cursors,
            block_size=max(1, min(_BLOCK_SIZE, self._sizes.largest // len(start.cursors))),
            prepare=self._score_view,
            collate=collate,
            end_epoch=None if config.repeat else self.epoch + 1,
            on_bad_example=config.on_bad_example,
            num_workers=config.num_workers,
            timeout_s=config.timeout_s,
        )
        self._window = Window(self._reader, start)

    def _abandon(self, position: Position) -> None:
        """Closes the reader and drops what it read; reading goes on at `position`."""
        self.pause()
        self._reader = self._window = None
        self._start = position

    def _go_to(self, position: Position, *, restored: list[Mapping[str, Any]]) -> None:
        """Forgets what is in flight; reading goes on at `position`."""
        self._abandon(position)
        self._in_flight.clear()
        self._restored, self._error, self._tail = restored, None, None

    def _hand_out(self, scored: Scored) -> Columns:
        """Returns the chosen rows, gathered on the stream that the training loop uses."""
        super_batch, selection = scored.super_batch, scored.selection
        is_late = selection.is_finite.device.type != "cpu"  # on a CPU it raised when scoring
        if is_late and not selection.is_finite:
            self._go_to(super_batch.start, restored=[])  # to be chosen from again
            raise NonFiniteError(
                f"scoring for step {self.step} gave NaN or infinity. Check the learner (has "
                f"training diverged?), the reference and the autocast dtype."
            )
        with self._metrics.timed("yielding"):
            image = "image" if self._train_view is None else "raw_image"
            needed = columns_of(super_batch.columns, (image, "text", "key"))
            batch = take_rows(needed, selection.indices)
            batch["weight"] = selection.weights
            if self._train_view is not None:
                put_view(batch, "image", self._train_view(batch.pop("raw_image"), step=self.step))
            return {name: moved(column, self._device) for name, column in batch.items()}

    def _count(self, scored: Scored) -> None:
        """Books what is handed out, when it is: a checkpoint counts what it describes."""
        super_batch, metrics = scored.super_batch, self._metrics
        rows = list(zip(super_batch.columns["shard"], super_batch.columns["key"], strict=True))
        metrics.count("steps")
        metrics.count("samples_read", super_batch.size)
        metrics.count("samples_trained", len(scored.selection.indices))
        metrics.count("super_batch_duplicates", super_batch.size - len(set(rows)))
        self._count_skipped(super_batch)
        metrics.count_groups(
            scored.selection.group_counts.tolist(), scored.selection.quota_excess.tolist()
        )
        metrics.observe(
            scored.selection,
            staleness=None if scored.weights_step is None else self.step - scored.weights_step,
        )

    def _count_skipped(self, super_batch: SuperBatch) -> None:
        for reason, amount in super_batch.skipped.items():
            self._metrics.count_skipped(reason, amount)

    def _end_pass(self) -> None:
        """Books what is left at the end of a pass: fewer examples than make a sub-batch."""
        assert self._tail is not None
        if self.epoch_step == 0:
            raise ConfigError(
                f"batch_size={self._sizes.batch_size}, but a whole pass over the data gives this "
                f"rank {self._tail.size} examples. Use a smaller batch_size, more data, or "
                f"repeat=True."
            )
        self._metrics.count("epoch_tail", self._tail.size)
        self._count_skipped(self._tail)
        self.begin_epoch()

    def state_dict(self, *, include_learner_copy: bool) -> dict[str, Any]:
        """Returns what describes the last batch handed out: no samples, no open files."""
        head = self._in_flight[0].super_batch.start if self._in_flight else self._position
        return {
            "version": _VERSION,
            "layout": self._layout_state(),
            "step": self.step,
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "cursors": {lane: list(cursor) for lane, cursor in head.cursors.items()},
            "next_lane": head.next_lane,
            "in_flight": [*map(_record, self._in_flight), *self._restored],
            "counters": self._metrics.state_dict(),
            "learner_copy": self._selector.copy_state() if include_learner_copy else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place of a checkpoint, without reading yet.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        _check_layout(state, self._layout_state(), lanes=self._layout.lanes)
        cursors = {lane: Cursor(*cursor) for lane, cursor in state["cursors"].items()}
        self._go_to(Position(cursors, state["next_lane"]), restored=list(state["in_flight"]))
        self.step, self.epoch = state["step"], state["epoch"]
        # An epoch may have another length by now.
        self.epoch_step = state["epoch_step"] % (self._config.steps_per_epoch or sys.maxsize)
        self.is_resumed = True
        self._metrics.load_state_dict(state["counters"])
        self._selector.load_copy_state(state["learner_copy"])

    def _layout_state(self) -> dict[str, Any]:
        config = self._config
        return {
            "source": self._source.fingerprint,
            "num_shards": self._source.num_shards,
            "seed": config.seed,
            "lanes": self._layout.num_lanes,
            "world_size": self._layout.world_size,
            "batch_size": self._sizes.batch_size,
            "super_batch_size": [list(change) for change in self._sizes.changes],
            "lookahead": config.lookahead,
            "repeat": config.repeat,
            "quotas": self._selector.groups,
        }


def _record(scored: Scored) -> dict[str, Any]:
    """What a checkpoint keeps of a super-batch in flight: new weights would choose otherwise."""
    selection = {
        field.name: getattr(scored.selection, field.name).to("cpu", copy=True)
        for field in fields(Selection)
    }
    return {
        "size": scored.super_batch.size,
        "selection": selection,
        "weights_step": scored.weights_step,
    }


def _check_layout(
    state: Mapping[str, Any], expected: Mapping[str, Any], *, lanes: list[int]
) -> None:
    if state.get("version") != _VERSION:
        raise ResumeMismatchError(
            f"the checkpoint has format version {state.get('version')}, this release reads "
            f"{_VERSION}. Resume with the release that wrote it."
        )
    saved = state["layout"]
    for name, value in expected.items():
        if saved[name] != value:
            raise ResumeMismatchError(
                f"the checkpoint was taken with {name}={saved[name]!r}, this dataset has "
                f"{name}={value!r}. Resume with the former value, or start a new run."
            )
    if sorted(state["cursors"]) != lanes:
        raise ResumeMismatchError(
            f"the checkpoint is of a rank that reads lanes {sorted(state['cursors'])}, this rank "
            f"reads {lanes}. Load on each rank the state that it saved."
        )
