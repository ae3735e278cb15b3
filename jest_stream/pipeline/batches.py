"""Makes the batch that the loop trains on of a scored super-batch, and counts both in the metrics.

Gathers the selected rows on the stream that the training loop uses: the batch's memory is its own.
Runs in the training thread; train views may be made in processes, ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jest_stream.metrics import Metrics
from jest_stream.pipeline.device import PendingSelection, moved
from jest_stream.pipeline.super_batches import ScoredSuperBatch, SuperBatch
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
    """Makes batches of selected rows. Owns the maker of train views.

    Args:
      late: makes the image that is trained on. None: it is the score view.
      pixel_tables: the work left to do to pixels, by their view: `image`, `train`.
      two_sizes: leaves a part of each batch at the score view. None: all get the train view.
      reference_of: makes the entry `reference` of rows of the columns. None: batches have none.
    """

    def __init__(
        self,
        late: LateViews | None,
        pixel_tables: Mapping[str, PixelTable],
        two_sizes: TwoSizes | None = None,
        reference_of: Callable[[Columns], dict[str, Tensor]] | None = None,
    ) -> None:
        self._late = late
        self._pixel_table = pixel_tables.get("image" if late is None else "train")
        self._two_sizes = two_sizes
        self._reference_of = reference_of

    def lookahead(self, scoring_device: torch.device) -> int:
        """Returns how many super-batches to score ahead where the user leaves that open.

        On CUDA a selection reaches the host a call later, and train views of it wait for that.
        """
        return 2 if self._late is not None and scoring_device.type == "cuda" else 1

    def open(self) -> None:
        """Starts the processes that make train views, if there are to be any."""
        if self._late is not None:
            self._late.open()

    def start(self, scored: ScoredSuperBatch, *, step: int) -> None:
        """Has the train views of a step made, unless that was asked before.

        Waits for the selection where it is still being made. Arguments as for `make`.
        """
        selection = scored.selection
        if self._late is None or self._late.has(step) or not selection.on_host().is_finite:
            return
        if self._two_sizes is not None:
            selection, _ = self._two_sizes.split(selection)
        columns = columns_of(scored.super_batch.on_host, self._late.columns)
        self._late.start(selection.take_rows_on_host(columns), step=step)

    def make(self, scored: ScoredSuperBatch, *, step: int, device: torch.device) -> Columns:
        """Returns the selected candidates as columns on `device`.

        Args:
          scored: the candidates and their selection.
          step: of the batch; names the random state of the train view.
          device: where the batch is wanted.
        """
        super_batch, selection = scored.super_batch, scored.selection
        small: Columns = {}
        names = ["image", "text", "key"]
        if self._late is not None:
            self.start(scored, step=step)
            names.remove("image")  # it comes from the train view
        if self._two_sizes is not None:
            selection, small_selection = self._two_sizes.split(selection)
            small = self._two_sizes.small(super_batch.columns, small_selection, device)
            small.update(self._reference(super_batch, small_selection, device, "small_reference"))
        # Rows are taken where the candidates lie, then moved: b of B rows cross to another device.
        batch = selection.take_rows(columns_of(super_batch.columns, names))
        batch["weight"] = selection.weights(device)
        if self._late is not None:
            put_view(batch, "image", self._late.take(step))
        batch = {name: moved(column, device) for name, column in batch.items()}
        batch.update(self._reference(super_batch, selection, device, "reference"))
        image = batch.get("image")
        if self._pixel_table is not None and isinstance(image, Tensor):
            # Of b rows instead of B, on the batch's device.
            batch["image"] = self._pixel_table(image)
        if self._two_sizes is not None:
            batch.update(small)
            self._two_sizes.check(batch)
        return batch

    def _reference(
        self, super_batch: SuperBatch, selection: PendingSelection, device: torch.device, name: str
    ) -> Columns:
        if self._reference_of is None:
            return {}
        rows = selection.take_rows(columns_of(super_batch.columns, (REFERENCE,)))
        return {name: {key: moved(v, device) for key, v in self._reference_of(rows).items()}}

    def pause(self) -> None:
        """Stops processes. Train views that were asked for are made anew when they are due."""
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


def book(metrics: Metrics, scored: ScoredSuperBatch, batch: Columns, *, step: int) -> None:
    """Counts a super-batch, and the batch that was handed out of it at a step."""
    super_batch, weights_step = scored.super_batch, scored.weights_step
    selection = scored.selection.on_host()
    rows = list(zip(super_batch.columns["shard"], super_batch.columns["key"], strict=True))
    metrics.count("steps")
    metrics.count("samples_read", super_batch.size)
    metrics.count("samples_trained", len(selection.indices))
    metrics.count("super_batch_duplicates", super_batch.size - len(set(rows)))
    book_skipped(metrics, super_batch)
    metrics.add_device_seconds(scored.selection.device_seconds())
    metrics.count_groups(selection.group_counts.tolist(), selection.quota_excess.tolist())
    metrics.observe(selection, staleness=None if weights_step is None else step - weights_step)
    for part, is_small in ((batch, False), (small_part(batch), True)):
        if part:
            metrics.accounting.count_trained(
                view_of(part, "image"),
                view_of(part, "text"),
                was_scored=weights_step is not None,
                is_small=is_small,
            )


def book_skipped(metrics: Metrics, super_batch: SuperBatch) -> None:
    """Counts the examples left out while a super-batch was read, and its source's own counts."""
    for reason, amount in super_batch.skipped.items():
        metrics.count_skipped(reason, amount)
    metrics.count_source(super_batch.counts)
