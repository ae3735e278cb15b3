"""Keeps the counters, last values, times and FLOPs of a stream, as one flat dict for loggers.

Fed by the training thread. Tensors are kept as they come and read only by `as_dict`: no step waits
for the device. The keys are public, and call examples samples.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from jest_stream.metrics.accounting import Accounting, ForwardPass, Model
from jest_stream.metrics.run_cost import RunCost
from jest_stream.types import Selection

_COUNTERS = (
    "steps",  # sub-batches handed out
    "samples_read",  # usable examples of the source
    "samples_scored",
    "samples_trained",  # handed out
    "epoch_tail",  # too few for a batch at the end of a pass, on this rank or on another
    "epoch_abandoned",  # read for batches that were not handed out: the pass was broken off
    "super_batch_duplicates",  # keys that came again within one super-batch
)
_STAGES = ("data", "scoring", "selecting", "yielding", "training")
_FLOPS = (
    "training",
    "learner_scoring",
    "reference_scoring",
    "selection",
    "ratio",
    "ratio_with_reuse",
)
_SKIPPED = "skipped/"
_OF_GROUPS = ("selected/", "quota_shortfall/", "quota_overrun/")


def shared_out(
    states: Sequence[Mapping[str, int]], *, rank: int, world_size: int
) -> dict[str, int]:
    """Returns a rank's share of the counters of all ranks of a former run.

    The sum over the ranks stays, but for steps, which ranks take together: each gets all of them.
    """
    totals: Counter[str] = Counter()
    for state in states:
        totals.update(state)
    # 7 over 3 ranks are 3, 2 and 2.
    shares = {
        name: total // world_size + (rank < total % world_size) for name, total in totals.items()
    }
    return {**shares, "steps": max(state["steps"] for state in states)}


class Metrics:
    """Counters, last values and times of one dataset."""

    def __init__(
        self, groups: Iterable[object] = (), *, training_flops: float | None = None
    ) -> None:
        """Starts at zero.

        Args:
          groups: names of the groups that have a quota, in the order of `count_groups`.
          training_flops: FLOPs of a training step per example, see `Accounting`.
        """
        self.accounting = Accounting(training_flops=training_flops)
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._groups = [str(group) for group in groups]
        self._group_counts = {f"{name}{group}": 0 for name in _OF_GROUPS for group in self._groups}
        self._skipped: Counter[str] = Counter()
        self._of_source: Counter[str] = Counter()
        self._seconds = dict.fromkeys(_STAGES, 0.0)
        self._device_seconds: dict[str, float] = {}
        self._stage: str | None = None  # the stage whose time is running
        self._since = 0.0  # the clock at its start
        self._selection: Selection | None = None
        self._staleness: int | None = None

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter: steps, samples_read, samples_scored, samples_trained, ..."""
        self._counts[name] += amount

    def count_skipped(self, reason: str, amount: int = 1) -> None:
        """Adds examples that were left out, under the reason's name."""
        self._skipped[reason] += amount

    def count_source(self, counts: Mapping[str, int]) -> None:
        """Adds the counts of reading, under the names that the source gives."""
        self._of_source.update(counts)

    def count_groups(self, counts: list[int], excess: list[int]) -> None:
        """Adds the examples handed out of each group, and by how many they missed its quota."""
        for group, count, above in zip(self._groups, counts, excess, strict=True):
            self._group_counts[f"selected/{group}"] += count
            self._group_counts[f"quota_shortfall/{group}"] += max(0, -above)
            self._group_counts[f"quota_overrun/{group}"] += max(0, above)

    def add_device_seconds(self, seconds: Mapping[str, float]) -> None:
        """Adds how long the device worked on a stage, where that is not the host's time."""
        for stage, amount in seconds.items():
            self._device_seconds[stage] = self._device_seconds.get(stage, 0.0) + amount

    def observe(self, selection: Selection, *, staleness: int | None = None) -> None:
        """Replaces the last values by those of the sub-batch handed out now.

        Args:
          selection: how it was chosen. Its tensors are kept, not read.
          staleness: steps between the weights it was scored with and this step; None without
            a learner.
        """
        self._selection = selection
        self._staleness = staleness

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to a stage: data, scoring, selecting, yielding.

        Stages nest: the inner one's time is not counted in the outer one.
        On CUDA this is the host's time, without the work that it only enqueued: see
        `add_device_seconds`.
        """
        outer = self._stage
        self._switch_to(stage)
        try:
            yield
        finally:
            self._switch_to(outer)

    def hand_over(self) -> None:
        """Counts the time from now on as the user's training, until a stage begins."""
        self._switch_to("training")

    def stop_clock(self) -> None:
        """Counts no time until a stage begins: the loop over the dataset has ended."""
        self._switch_to(None)

    def price(self, passes: Mapping[Model, ForwardPass]) -> None:
        """Measures missing prices, see `Accounting`; within a loop as part of yielding."""
        with self.timed("yielding") if self._stage else nullcontext():
            self.accounting.price(passes)

    def cost(self) -> RunCost:
        """Returns the cost of the run so far, FLOPs as far as they are priced."""
        self._switch_to(self._stage)  # books the time that is running
        return RunCost(
            samples_read=self._counts["samples_read"],
            samples_scored=self._counts["samples_scored"],
            samples_trained=self._counts["samples_trained"],
            flops=self.accounting.flops(),
            is_training_estimated=self.accounting.is_training_estimated,
            **{f"{stage}_s": seconds for stage, seconds in self._seconds.items()},
        )

    def as_dict(self) -> dict[str, float | int]:
        """Returns everything, flat, under the same keys each time.

        Keys first counted later come in later: reasons of skipping, counts of the source, and on
        CUDA `scoring_device_s` and `selecting_device_s`, the device's seconds for the batches that
        were handed out. Last values are NaN before the first batch and for uniform selection,
        FLOPs where they are not priced. Times are seconds since this object was made; the counters
        go on after a resume.
        """
        nan = math.nan
        last = self._selection
        flops = self.accounting.flops()
        self._switch_to(self._stage)  # books the time that is running
        return {
            **dict(sorted(self._of_source.items())),
            **self._counts,
            "samples_skipped": sum(self._skipped.values()),
            **{_SKIPPED + reason: count for reason, count in sorted(self._skipped.items())},
            **self._group_counts,
            "staleness": nan if self._staleness is None else self._staleness,
            "effective_support": float(last.effective_support.mean()) if last else nan,
            "selected_score": float(last.selected_score) if last else nan,
            "candidate_score": float(last.candidate_score) if last else nan,
            **{f"flops_{name}": getattr(flops, name) for name in _FLOPS},
            **{f"{stage}_s": seconds for stage, seconds in self._seconds.items()},
            **{f"{stage}_device_s": amount for stage, amount in self._device_seconds.items()},
        }

    def state_dict(self) -> dict[str, int]:
        """Returns the counters, flat. Times and last values belong to a process: not saved."""
        return {
            **self._of_source,
            **self._counts,
            **{_SKIPPED + reason: count for reason, count in self._skipped.items()},
            **self._group_counts,
            **self.accounting.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting from `state`."""
        self._counts = {name: state[name] for name in _COUNTERS}
        # Quotas may change with a resume: new groups start at 0.
        self._group_counts = {name: state.get(name, 0) for name in self._group_counts}
        self.accounting.load_state_dict(state)
        # The state is flat. A prefix tells the owner of a counter; names that are neither prefixed
        # nor among `_COUNTERS` are counts of the source.
        self._skipped, self._of_source = Counter(), Counter()
        for name, count in state.items():
            if name.startswith(_SKIPPED):
                self._skipped[name.removeprefix(_SKIPPED)] = count
            elif not (name in _COUNTERS or name.startswith(_OF_GROUPS) or Accounting.owns(name)):
                self._of_source[name] = count

    def _switch_to(self, stage: str | None) -> None:
        # One clock runs at a time: a stage within another stops the outer one, and their times add
        # up to the wall clock's.
        now = time.perf_counter()
        if self._stage is not None:
            self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
