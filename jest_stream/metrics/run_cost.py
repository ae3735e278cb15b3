"""Compares the cost of a run with the savings that would pay for it, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jest_stream.metrics.flops import Flops

_UNITS = (
    ("EFLOP", 1e18),
    ("PFLOP", 1e15),
    ("TFLOP", 1e12),
    ("GFLOP", 1e9),
    ("MFLOP", 1e6),
    ("kFLOP", 1e3),
)


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of a run so far, on this rank. `str()` of it is a summary of a few lines."""

    samples_read: int
    """Candidates of the batches handed out."""
    samples_scored: int
    """Candidates that a model embedded, those in flight included."""
    samples_trained: int
    """Examples handed out."""
    flops: Flops
    """By purpose; NaN where they are not known."""
    is_training_estimated: bool
    """Whether a training step was taken to cost three forward passes of the learner."""
    data_s: float
    """Seconds of waiting for data."""
    scoring_s: float
    """Seconds of refreshing the learner copy and of embedding; on CUDA of the host only."""
    selecting_s: float
    """Seconds of choosing."""
    yielding_s: float
    """Seconds of making batches, and of everything else in the dataset."""
    training_s: float
    """Seconds outside the dataset, between two batches of a loop."""

    @property
    def wall_s(self) -> float:
        """Seconds of all loops over the dataset in this process, from their first batch on."""
        inside = self.data_s + self.scoring_s + self.selecting_s + self.yielding_s
        return inside + self.training_s

    @property
    def savings_to_pay(self) -> float:
        """Share of a uniform run's steps that selection must save to pay in FLOPs; below 0 if the
        steps cost less than uniform ones."""
        return 1 - 1 / self.flops.ratio  # steps of twice the cost pay if they are half as many

    def __str__(self) -> str:
        examples = (
            f"examples: {self.samples_read:,} read, {self.samples_scored:,} scored, "
            f"{self.samples_trained:,} trained"
        )
        seconds = (
            f"seconds: {self.data_s:.1f} waiting for data, {self.scoring_s:.1f} scoring, "
            f"{self.selecting_s:.1f} selecting, {self.yielding_s:.1f} yielding, "
            f"{self.training_s:.1f} training"
        )
        return "\n".join([examples, self._shares(), self._verdict(), seconds])

    def _shares(self) -> str:
        flops = self.flops
        parts = {
            "training": flops.training,
            "learner scoring": flops.learner_scoring,
            "reference scoring": flops.reference_scoring,
            "selection": flops.selection,
        }
        largest = max((part for part in parts.values() if not math.isnan(part)), default=0.0)
        # All parts in the unit of the largest: they are to be compared.
        unit, size = next((unit for unit in _UNITS if largest >= unit[1]), ("FLOP", 1.0))
        listed = ", ".join(
            f"{'unknown' if math.isnan(part) else f'{part / size:.3g}'} {name}"
            for name, part in parts.items()
        )
        note = " (training estimated as three forward passes)" * self.is_training_estimated
        return f"{unit}: {listed}{note}"

    def _verdict(self) -> str:
        ratio, with_reuse = self.flops.ratio, self.flops.ratio_with_reuse
        if math.isnan(ratio):
            return "cost against uniform training: unknown (ask before close(); see metrics())"
        found = f"{ratio:.2f} times the FLOPs of uniform training"
        if with_reuse < ratio:
            found += f" ({with_reuse:.2f} as the paper counts, which scores and trains in one pass)"
        if self.samples_scored == 0:
            return f"{found}: nothing was scored"
        if ratio <= 1:  # at two sizes the savings in training can outweigh scoring
            return f"{found}: it pays at as many steps"
        return (
            f"{found}: selection pays if it saves more than {self.savings_to_pay:.0%} of the steps"
        )
