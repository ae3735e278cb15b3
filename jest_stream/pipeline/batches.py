"""What is handed out of a super-batch, once it is chosen from: the batch that the loop trains on.

Gathers the chosen rows on the stream that the training loop uses, so that the memory is its own.
Runs in the training thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jest_stream.metrics import Accounting, Metrics
from jest_stream.pipeline.device import Choice, moved
from jest_stream.pipeline.super_batches import Scored, SuperBatch, take_rows, take_rows_on_host
from jest_stream.pipeline.two_sizes import TwoSizes, small_part
from jest_stream.views import (
    REFERENCE,
    Columns,
    LateViews,
    PixelTable,
    columns_of,
    put_view,
    view_of,
)


class Batches:
    """Makes batches of chosen rows. Owns what makes train views ahead of time.

    Args:
      late: makes the image that is trained on. None: it is the score view.
      finishes: what is left to do to pixels, by what they are: `image`, `train`.
      two_sizes: leaves a part of each batch at the score view. None: all get the train view.
      reference_of: makes the entry `reference` of rows of the columns. None: there is none.
    """

    def __init__(
        self,
        late: LateViews | None,
        finishes: Mapping[str, PixelTable],
        two_sizes: TwoSizes | None = None,
        reference_of: Callable[[Columns], dict[str, Tensor]] | None = None,
    ) -> None:
        self._late = late
        self._finish = finishes.get("image" if late is None else "train")
        self._two_sizes = two_sizes
        self._reference_of = reference_of

    def lookahead(self, scoring_device: torch.device) -> int:
        """Returns how many super-batches to score ahead where the user leaves that open.

        On CUDA a choice reaches the host a call later, which train views of it have to wait for.
        """
        return 2 if self._late is not None and scoring_device.type == "cuda" else 1

    def open(self) -> None:
        """Starts the processes that make train views, if there are to be any."""
        if self._late is not None:
            self._late.open()

    def start(self, super_batch: SuperBatch, choice: Choice, *, step: int) -> None:
        """Has the train views of a step made, unless that was asked before.

        Waits for the choice where it is still being made. Arguments as for `make`.
        """
        if self._late is None or self._late.has(step) or not choice.on_host().is_finite:
            return
        if self._two_sizes is not None:
            choice, _ = self._two_sizes.split(choice)
        columns = columns_of(super_batch.on_host, self._late.columns)
        self._late.start(take_rows_on_host(columns, choice.on_host().indices), step=step)

    def make(
        self, super_batch: SuperBatch, choice: Choice, *, step: int, device: torch.device
    ) -> Columns:
        """Returns the chosen of the candidates as columns on `device`.

        Args:
          super_batch: the candidates.
          choice: which of its rows were chosen.
          step: of the batch; names the random state of the train view.
          device: where the batch is wanted.
        """
        names = ("text", "key") if self._late is not None else ("image", "text", "key")
        small: Columns = {}
        if self._late is not None:
            self.start(super_batch, choice, step=step)
        if self._two_sizes is not None:
            choice, small_choice = self._two_sizes.split(choice)
            small = self._two_sizes.small(super_batch.columns, small_choice, device)
            small.update(self._reference(super_batch, small_choice, device, "small_reference"))
        batch = take_rows(columns_of(super_batch.columns, names), choice)
        batch["weight"] = choice.weights(device)
        if self._late is not None:
            put_view(batch, "image", self._late.take(step))
        batch = {name: moved(column, device) for name, column in batch.items()}
        batch.update(self._reference(super_batch, choice, device, "reference"))
        image = batch.get("image")
        if self._finish is not None and isinstance(image, torch.Tensor):
            batch["image"] = self._finish(image)  # of the chosen only, where they are wanted
        if self._two_sizes is not None:
            batch.update(small)
            self._two_sizes.check(batch)
        return batch

    def _reference(
        self, super_batch: SuperBatch, choice: Choice, device: torch.device, name: str
    ) -> Columns:
        if self._reference_of is None:
            return {}
        rows = take_rows(columns_of(super_batch.columns, (REFERENCE,)), choice)
        return {name: {key: moved(v, device) for key, v in self._reference_of(rows).items()}}

    def pause(self) -> None:
        """Stops processes. What was asked for is made anew when it is due."""
        if self._late is not None:
            self._late.pause()

    def forget(self) -> None:
        """Stops processes and forgets the train views that were asked for."""
        if self._late is not None:
            self._late.forget()


def structured(batch: Columns, *, as_dict: bool) -> Any:
    """Returns a batch as the training loop wants it: `(images, texts)`, or a dict.

    Of two sizes `((images, texts), (small_images, small_texts))`, or a dict with `small_image`, ...
    """
    image, text = view_of(batch, "image"), view_of(batch, "text")
    small = small_part(batch)
    if not as_dict:
        whole = (image, text)
        return (whole, structured(small, as_dict=False)) if small else whole
    found = {"image": image, "text": text, "key": batch["key"], "weight": batch["weight"]}
    if "reference" in batch:
        found["reference"] = batch["reference"]
    if small:
        part = structured(small, as_dict=True)
        found.update({f"small_{name}": value for name, value in part.items()})
    return found


def count_trained(batch: Columns, accounting: Accounting, *, was_scored: bool) -> None:
    """Books the rows of a batch as trained on.

    Args:
      batch: as `Batches.make` gave it.
      accounting: where to.
      was_scored: whether the learner copy embedded their score views.
    """
    for part, is_small in ((batch, False), (small_part(batch), True)):
        if part:
            accounting.count_trained(
                view_of(part, "image"),
                view_of(part, "text"),
                was_scored=was_scored,
                is_small=is_small,
            )


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
