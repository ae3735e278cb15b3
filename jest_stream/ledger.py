"""What is handed out, booked when it is: a checkpoint then counts what it describes."""

from __future__ import annotations

from dataclasses import dataclass

from jest_stream.batches import count_trained
from jest_stream.reporting import Metrics
from jest_stream.scoring.choice import Choice
from jest_stream.superbatch import SuperBatch
from jest_stream.views import Columns


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A super-batch in flight: chosen from, not yet handed out."""

    super_batch: SuperBatch
    choice: Choice
    weights_step: int | None
    """The step whose learner weights it was scored with; None without a learner."""


class Ledger:
    """Books super-batches in the metrics of a dataset."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def book(self, scored: Scored, batch: Columns, *, step: int) -> None:
        """Counts a super-batch, and what was handed out of it, at a step."""
        super_batch, metrics = scored.super_batch, self._metrics
        selection = scored.choice.on_host()
        rows = list(zip(super_batch.columns["shard"], super_batch.columns["key"], strict=True))
        metrics.count("steps")
        metrics.count("samples_read", super_batch.size)
        metrics.count("samples_trained", len(selection.indices))
        metrics.count("super_batch_duplicates", super_batch.size - len(set(rows)))
        self.book_skipped(super_batch)
        metrics.add_device_seconds(scored.choice.device_seconds())
        metrics.count_groups(selection.group_counts.tolist(), selection.quota_excess.tolist())
        metrics.observe(
            selection,
            staleness=None if scored.weights_step is None else step - scored.weights_step,
        )
        count_trained(batch, metrics.accounting, was_scored=scored.weights_step is not None)

    def book_skipped(self, super_batch: SuperBatch) -> None:
        """Counts what was left out while a super-batch was read, and what its source counted."""
        for reason, amount in super_batch.skipped.items():
            self._metrics.count_skipped(reason, amount)
        self._metrics.count_source(super_batch.counts)
