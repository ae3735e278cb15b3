"""A super-batch in, the chosen rows out: runs the selection rule on what the models say.

Runs in the training thread, without gradients.
"""

from __future__ import annotations

from torch import Tensor

from jest_stream.config import Loss, SelectionConfig, TargetSimilarity
from jest_stream.metrics import Metrics
from jest_stream.pipeline.device import Choice, Slot, moved
from jest_stream.pipeline.embedder import Embedder
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
from jest_stream.views import Columns


class Selector:
    """Chooses sub-batches by the rule of a `SelectionConfig`."""

    def __init__(
        self,
        config: SelectionConfig,
        embedder: Embedder,
        *,
        loss: Loss,
        metrics: Metrics,
        with_reference: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
          config: the rule.
          embedder: what is known of candidates.
          loss: the family of the pair losses.
          metrics: where scores are counted and timed.
          with_reference: whether the reference's embeddings are to stay with the candidates.
        """
        self._config = config
        self._embedder = embedder
        self._loss = loss
        self._metrics = metrics
        self._with_reference = with_reference
        self._targets: dict[int, Tensor] = {}  # of terms, on the device

    @property
    def groups(self) -> list[str]:
        """Names of the groups that have a quota, in order."""
        return [str(group) for group in self._config.quotas or ()]

    def choose(
        self,
        columns: Columns,
        *,
        slot: Slot,
        size: int,
        batch_size: int,
        key: int,
        step: int,
        now: int,
    ) -> tuple[Choice, int | None]:
        """Returns which of the `size` candidates make the sub-batch of `step`.

        Args:
          columns: score views of the candidates, on the scoring device.
          slot: what keeps their memory.
          key: names the run's noise; with `step` and an example's position it names a draw.
          now: the step at hand, whose learner weights are copied if they are due.

        Returns:
          The choice, and the step of the learner weights behind it; None without a learner.
        """
        embedder = self._embedder
        is_uniform = self._config.method == "uniform" or size == batch_size  # nothing to score for
        if not is_uniform:
            with self._metrics.timed("scoring"):
                embedder.refresh(now)
        if not is_uniform or self._with_reference:
            self._prepare(columns)
        with embedder.at_work(slot):
            if not is_uniform:
                found = self._choose_scored(columns, slot, size, batch_size, key, step)
                return slot.keep(found), embedder.weights_step
            if self._with_reference:
                embedder.add_reference(columns, slot)
            uniform = uniform_selection(
                size,
                batch_size=batch_size,
                groups=self._groups(columns),
                key=key,
                step=step,
                device=embedder.ring.device,
            )
            return slot.keep(uniform), None

    def restore(self, columns: Columns, *, slot: Slot, selection: Selection) -> Choice:
        """Returns a choice of a former run, as `choose` did.

        Args:
          columns: score views of the candidates, on the scoring device.
          slot: what keeps their memory.
          selection: what was chosen, on the CPU.
        """
        if self._with_reference:
            self._prepare(columns)
            with self._embedder.at_work(slot):
                self._embedder.add_reference(columns, slot)
        return slot.restore(selection)

    def _prepare(self, columns: Columns) -> None:
        with self._metrics.timed("scoring"):
            self._embedder.prepare(columns)
            ring = self._embedder.ring
            for number, term in enumerate(self._config.terms):
                if isinstance(term, TargetSimilarity) and number not in self._targets:
                    with ring.writing(None):
                        self._targets[number] = moved(term.targets, ring.device)

    def _choose_scored(
        self, columns: Columns, slot: Slot, size: int, batch_size: int, key: int, step: int
    ) -> Selection:
        config = self._config
        with self._metrics.timed("scoring"), slot.timed("scoring"):
            learner, reference = self._embedder.embed(columns)
            if self._with_reference:
                self._embedder.add_reference(columns, slot, reference)
        self._metrics.count("samples_scored", size)
        self._metrics.accounting.count_selection(
            choice_flops(config, learner, reference, batch_size=batch_size)
        )
        with self._metrics.timed("selecting"), slot.timed("selecting"):
            rule = DrawRule(
                gain=config.gain,
                effective_support=config.effective_support,
                terms=self._terms(columns, reference),
                uniform_fraction=config.uniform_fraction,
                groups=self._groups(columns),
            )
            if config.method == "independent":
                return independent_selection(
                    learner,
                    reference,
                    batch_size=batch_size,
                    score=config.score,
                    loss=self._loss,
                    rule=rule,
                    key=key,
                    step=step,
                )
            return joint_selection(
                learner,
                reference,
                batch_size=batch_size,
                num_chunks=min(config.num_chunks, batch_size),
                num_sweeps=config.num_sweeps,
                score=config.score,
                loss=self._loss,
                rule=rule,
                key=key,
                step=step,
            )

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
