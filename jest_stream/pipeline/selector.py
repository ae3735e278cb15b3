"""Scores a super-batch and selects its sub-batch.

Owns the device of scoring with its streams and slots (`Ring`), the models that embed (`Embedder`)
and the rule. Runs in the training thread, without gradients; on CUDA it only queues work. Shapes:
B: super-batch size, b: batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jest_stream.config import ScoringConfig, SelectionConfig, TargetSimilarity
from jest_stream.metrics import Metrics
from jest_stream.pipeline.device import Ring, Slot, moved
from jest_stream.pipeline.embedder import Embedder
from jest_stream.pipeline.models import Models
from jest_stream.pipeline.super_batches import ScoredSuperBatch, SuperBatch
from jest_stream.selection import (
    DrawRule,
    Groups,
    choice_flops,
    independent_selection,
    joint_selection,
    target_similarity,
    uniform_selection,
)
from jest_stream.types import Embeddings, Selection
from jest_stream.views import REFERENCE, Columns, PixelTable


class Selector:
    """Scores super-batches and selects their sub-batches by the rule of a `SelectionConfig`.

    Args:
      config: the rule.
      models: learner and reference, as far as the rule needs them.
      scoring: how they embed.
      refresh_every: steps between copies of the learner's weights.
      pixel_tables: the work left to do to pixels, by the name of their view.
      key: names the noise of this rank; with a step and a candidate's place it names a draw.
      metrics: where scores are counted and timed.
      with_reference: whether the reference's embeddings are to stay with the candidates.
    """

    def __init__(
        self,
        config: SelectionConfig,
        models: Models,
        *,
        scoring: ScoringConfig,
        refresh_every: int,
        pixel_tables: Mapping[str, PixelTable],
        key: int,
        metrics: Metrics,
        with_reference: bool = False,
    ) -> None:
        self._config = config
        self._loss = models.loss
        self._key = key
        self._metrics = metrics
        self._with_reference = with_reference
        self._ring = Ring()
        self._embedder = Embedder(
            models,
            self._ring,
            scoring=scoring,
            refresh_every=refresh_every,
            metrics=metrics,
            pixel_tables=pixel_tables,
        )
        self._targets: dict[int, Tensor] = {}  # of terms, on the device
        self._has_failed = False  # the learner may have been repaired since: copy it anew

    @property
    def groups(self) -> list[str]:
        """Names of the groups that have a quota, in order."""
        return [str(group) for group in self._config.quotas or ()]

    @property
    def weights_step(self) -> int | None:
        """The step whose learner weights score at present; None without a learner copy."""
        return self._embedder.weights_step

    def place(self, device: torch.device) -> None:
        """Scores on this device from now on. To be called before the first super-batch is read."""
        self._ring.place(device)

    def slot(self, in_use: Collection[ScoredSuperBatch]) -> Slot:
        """Returns the memory for another super-batch, beside those in use."""
        return self._ring.slot([scored.super_batch.slot for scored in in_use])

    def select(
        self, super_batch: SuperBatch, *, batch_size: int, step: int, now: int
    ) -> ScoredSuperBatch:
        """Returns the super-batch with the selection of the sub-batch of `step`.

        Args:
          super_batch: B candidates.
          batch_size: b.
          step: of the sub-batch.
          now: the step at hand, whose learner weights are copied if they are due.
        """
        # There are two cases:
        # 1. All candidates are equal: by the rule, or because B = b, where all are taken. They are
        #    not scored, and the learner's weights are not even copied.
        # 2. Learner copy and reference embed all candidates, and the rule draws by their losses.
        is_scored = self._config.method != "uniform" and super_batch.size > batch_size
        if is_scored:
            with self._metrics.timed("scoring"):
                self._embedder.refresh(now, force=self._has_failed)
        if is_scored or self._with_reference:
            self._prepare(super_batch.columns)
        with self._queued(super_batch.slot):
            draw = self._draw if is_scored else self._draw_uniformly
            pending = super_batch.slot.keep(draw(super_batch, batch_size, step))
        return ScoredSuperBatch(
            super_batch=super_batch,
            selection=pending,
            weights_step=self.weights_step if is_scored else None,
        )

    def restore(
        self, super_batch: SuperBatch, selection: Selection, weights_step: int | None
    ) -> ScoredSuperBatch:
        """Returns a super-batch of a former run with its selection, which lies on the CPU."""
        if self._with_reference:
            self._prepare(super_batch.columns)
            with self._queued(super_batch.slot):
                self._keep_reference(super_batch)
        pending = super_batch.slot.restore(selection)
        return ScoredSuperBatch(
            super_batch=super_batch, selection=pending, weights_step=weights_step
        )

    def reference_of(self, rows: Columns) -> dict[str, Tensor]:
        """Returns the entry `reference` of a batch, see `Embedder.reference_of`."""
        return self._embedder.reference_of(rows)

    def refresh(self, step: int) -> None:
        """Copies the learner's weights now, which are those of `step`."""
        self._embedder.refresh(step, force=True)

    def price(self) -> None:
        """Measures the cost of the models' forward passes, as far as it is not known."""
        self._embedder.price()

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the learner copy's weights for a checkpoint, None if there is no copy."""
        self._ring.drain()  # the copy may have been written on another stream than the present one
        return self._embedder.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes the learner copy of a checkpoint; None has it made anew."""
        self._ring.drain()  # the copy may be in use
        self._embedder.load_state_dict(state)

    def close(self) -> None:
        """Waits for the device, then lets go of its memory and of the models."""
        self._ring.close()
        self._embedder.close()

    def _prepare(self, columns: Columns) -> None:
        """Makes the models and tensors that embedding reads, on the caller's current stream."""
        with self._metrics.timed("scoring"):
            self._embedder.prepare(columns)
            for number, term in enumerate(self._config.terms):
                if isinstance(term, TargetSimilarity) and number not in self._targets:
                    with self._ring.writing(None):
                        self._targets[number] = moved(term.targets, self._ring.device)

    @contextmanager
    def _queued(self, slot: Slot) -> Iterator[None]:
        """Queues the block's work on the scoring stream, after its columns and the weights."""
        self._has_failed = True
        with slot.scoring(self._embedder.weights_in_use):
            yield
        self._has_failed = False

    def _draw(self, super_batch: SuperBatch, batch_size: int, step: int) -> Selection:
        """Embeds the candidates, then draws by the rule."""
        config, columns, slot = self._config, super_batch.columns, super_batch.slot
        with self._metrics.timed("scoring"), slot.timed("scoring"):
            learner, reference = self._embedder.embed(columns)
            self._keep_reference(super_batch, reference)
        self._metrics.count("samples_scored", super_batch.size)
        self._metrics.accounting.count_selection(
            choice_flops(config, learner, reference, batch_size=batch_size)
        )
        select: Callable[..., Selection] = independent_selection
        if config.method == "joint":
            select = partial(
                joint_selection, num_chunks=config.num_chunks, num_sweeps=config.num_sweeps
            )
        with self._metrics.timed("selecting"), slot.timed("selecting"):
            return select(
                learner,
                reference,
                batch_size=batch_size,
                score=config.score,
                loss=self._loss,
                rule=DrawRule(
                    gain=config.gain,
                    effective_support=config.effective_support,
                    terms=self._terms(columns, reference),
                    uniform_fraction=config.uniform_fraction,
                    groups=self._groups(columns),
                ),
                key=self._key,
                step=step,
            )

    def _draw_uniformly(self, super_batch: SuperBatch, batch_size: int, step: int) -> Selection:
        self._keep_reference(super_batch)
        return uniform_selection(
            super_batch.size,
            batch_size=batch_size,
            groups=self._groups(super_batch.columns),
            key=self._key,
            step=step,
            device=self._ring.device,
        )

    def _keep_reference(self, super_batch: SuperBatch, reference: Embeddings | None = None) -> None:
        """Puts the reference's embeddings among the columns, where batches are to have them."""
        columns = super_batch.columns
        if not self._with_reference or f"{REFERENCE}/image" in columns:  # a cache's are read so
            return
        if reference is None:
            _, reference = self._embedder.embed(columns, with_learner=False)
        assert reference is not None
        for name in ("image", "text"):
            rows = getattr(reference, name)
            columns[f"{REFERENCE}/{name}"] = super_batch.slot.keep_rows(f"{REFERENCE}/{name}", rows)

    def _groups(self, columns: Columns) -> Groups | None:
        quotas = self._config.quotas
        return None if quotas is None else Groups(columns["group"], quotas)

    def _terms(self, columns: Columns, reference: Embeddings | None) -> Tensor | None:
        """Returns the sum of the terms of each candidate: `[B]`; None without any."""
        total: Tensor | None = columns.get("term")
        for number, term in enumerate(self._config.terms):
            if not isinstance(term, TargetSimilarity):
                continue
            assert reference is not None
            rows = reference.image if term.tower == "image" else reference.text
            found = term.weight * target_similarity(rows, self._targets[number], norm=term.norm)
            total = found if total is None else total + found
        return total
