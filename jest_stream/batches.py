"""What is handed out of a super-batch, once it is chosen from: the batch that the loop trains on.

Gathers the chosen rows on the stream that the training loop uses, so that the memory is its own.
Runs in the training thread.
"""

from __future__ import annotations

from typing import Any

import torch

from jest_stream.superbatch import moved, take_rows
from jest_stream.two_sizes import TwoSizes, small_part
from jest_stream.types import Selection
from jest_stream.views import Columns, TrainView, columns_of, put_view, view_of


class Batches:
    """Makes batches of chosen rows.

    Args:
      train_view: makes the image that is trained on, from the one that was read. None: it is the
        score view.
      two_sizes: leaves a part of each batch at the score view. None: all get the train view.
    """

    def __init__(self, train_view: TrainView | None, two_sizes: TwoSizes | None = None) -> None:
        self._train_view = train_view
        self._two_sizes = two_sizes

    def make(
        self, candidates: Columns, selection: Selection, *, step: int, device: torch.device
    ) -> Columns:
        """Returns the chosen of the candidates as columns on `device`.

        Args:
          candidates: columns of the super-batch.
          selection: which of its rows were chosen.
          step: of the batch; names the random state of the train view.
          device: where the batch is wanted.
        """
        small: Columns = {}
        if self._two_sizes is not None:
            selection, small_selection = self._two_sizes.split(selection)
            small = self._two_sizes.small(candidates, small_selection)
        image = "image" if self._train_view is None else "raw_image"
        batch = take_rows(columns_of(candidates, (image, "text", "key")), selection.indices)
        batch["weight"] = selection.weights
        if self._train_view is not None:
            put_view(batch, "image", self._train_view(batch.pop("raw_image"), step=step))
        if self._two_sizes is not None:
            batch.update(small)
            self._two_sizes.check(batch)
        return {name: moved(column, device) for name, column in batch.items()}


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
    if small:
        part = structured(small, as_dict=True)
        found.update({f"small_{name}": value for name, value in part.items()})
    return found
