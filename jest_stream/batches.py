"""What is handed out of a super-batch, once it is chosen from: the batch that the loop trains on.

Gathers the chosen rows on the stream that the training loop uses, so that the memory is its own.
Runs in the training thread.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from jest_stream.superbatch import moved, take_rows
from jest_stream.types import Embeddings, Selection
from jest_stream.views import Columns, TrainView, columns_of, put_view, view_of


class Batches:
    """Makes batches of chosen rows.

    Args:
      train_view: makes the image that is trained on, from the one that was read. None: it is the
        score view.
    """

    def __init__(self, train_view: TrainView | None) -> None:
        self._train_view = train_view

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
        image = "image" if self._train_view is None else "raw_image"
        batch = take_rows(columns_of(candidates, (image, "text", "key")), selection.indices)
        batch["weight"] = selection.weights
        if self._train_view is not None:
            put_view(batch, "image", self._train_view(batch.pop("raw_image"), step=step))
        return {name: moved(column, device) for name, column in batch.items()}


def structured(batch: Columns, *, as_dict: bool) -> Any:
    """Returns a batch as the training loop wants it: `(images, texts)`, or a dict."""
    image, text = view_of(batch, "image"), view_of(batch, "text")
    if not as_dict:
        return image, text
    found = {"image": image, "text": text, "key": batch["key"], "weight": batch["weight"]}
    if "reference" in batch:
        found["reference"] = batch["reference"]
    return found


def reference_entry(reference: Embeddings, device: torch.device) -> dict[str, Tensor]:
    """Returns the reference's embeddings of a batch as plain tensors on `device`."""
    values = {field.name: getattr(reference, field.name) for field in fields(Embeddings)}
    return {
        name: moved(torch.as_tensor(value, dtype=torch.float32), device)
        for name, value in values.items()
    }
