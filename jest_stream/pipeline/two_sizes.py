"""Cuts a selection in two: a part for the train view, and a part that stays at the score view.

Flexi-JEST (Evans et al. 2024, https://arxiv.org/abs/2406.17711) trains a part of every sub-batch at
the size that the learner copy scores at, which makes the model good at both. Runs in the training
thread. Shapes: b: batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.pipeline.device import PendingSelection, moved
from jest_stream.views import Columns, PixelTable, columns_of, put_view, scaled, view_of

_PREFIX = "small_"


def small_rows(batch_size: int, num_small: int) -> list[int]:
    """Returns the places of the draw order that are trained small.

    They are spread evenly, which takes a share of every chunk, first or last drawn.
    """
    # The middles of equal parts: 2 of 8 places are 1 * 8 // 4 = 2 and 3 * 8 // 4 = 6.
    return [(2 * row + 1) * batch_size // (2 * num_small) for row in range(num_small)]


class TwoSizes:
    """Cuts a sub-batch in two: a part at the train view, and a small part at the score view.

    Args:
      fraction: share that is trained at the score view.
      batch_size: b; the share becomes a number of examples here.
      scoring: names the size at which that view is scored, and now trained.
      pixel_table: finishes the uint8 pixels of that view.

    Raises:
      ConfigError: unless both parts get an example.
    """

    def __init__(
        self,
        fraction: float,
        batch_size: int,
        scoring: ScoringConfig,
        pixel_table: PixelTable | None = None,
    ) -> None:
        num_small = round(fraction * batch_size)
        if not 0 < fraction < 1 or not 0 < num_small < batch_size:
            raise ConfigError(
                f"score_view_fraction={fraction} of batch_size={batch_size} gives {num_small} "
                f"examples at the score view, but there must be some at each size. Pass a share "
                f"between 0 and 1, such as 0.5, or 0 to train at one size."
            )
        small = small_rows(batch_size, num_small)
        self._rest = torch.tensor(sorted(set(range(batch_size)) - set(small)))
        self._small = torch.tensor(small)
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}  # both, by device
        self._pixel_table = pixel_table
        self._fraction = fraction
        self._scoring = scoring

    @classmethod
    def of(
        cls,
        fraction: float,
        batch_size: int,
        scoring: ScoringConfig,
        *,
        has_train_view: bool,
        pixel_table: PixelTable | None = None,
    ) -> TwoSizes | None:
        """Returns the cut; None if all examples are trained at one size (fraction 0).

        Raises:
          ConfigError: for a share that cannot be, or where both views are the same.
        """
        if fraction == 0:
            return None
        two_sizes = cls(fraction, batch_size, scoring, pixel_table)
        # One of three things makes the small part cheaper: another transform, a smaller image_size,
        # fewer tokens. The sizes of the views show with the first batch, see `check`.
        if not has_train_view and scoring.image_size is None and not scoring.changes_tokens:
            raise ConfigError(two_sizes._no_smaller("the score view is the train view"))
        return two_sizes

    def split(self, selection: PendingSelection) -> tuple[PendingSelection, PendingSelection]:
        """Returns the part that gets the train view, and the part that stays at the score view."""
        device = selection.on_device.indices.device
        if device not in self._places:
            self._places[device] = self._rest.to(device), self._small.to(device)
        rest, small = self._places[device]
        return selection.part(rest, self._rest), selection.part(small, self._small)

    def small(
        self, candidates: Columns, selection: PendingSelection, device: torch.device
    ) -> Columns:
        """Returns the columns of the small part, named `small_image`, ...

        Args:
          candidates: columns of the super-batch.
          selection: its small part.
          device: where the batch is wanted.
        """
        rows = selection.take_rows(columns_of(candidates, ("image", "text", "key")))
        view: Any = view_of(rows, "image")
        if self._pixel_table is not None and isinstance(view, Tensor):
            view = self._pixel_table(view)
        put_view(rows, "image", scaled(view, self._scoring.image_size))
        rows["weight"] = selection.weights(device)
        return {_PREFIX + name: moved(column, device) for name, column in rows.items()}

    def check(self, batch: Columns) -> None:
        """Raises `ConfigError` if both parts of a batch are trained at one size."""
        if self._scoring.changes_tokens:  # equal images then make fewer tokens in the small part
            return
        large, small = _shapes(batch, "image"), _shapes(batch, _PREFIX + "image")
        if large == small:
            shape = " x ".join(str(side) for side in next(iter(small.values())))
            raise ConfigError(self._no_smaller(f"train view and score view are both {shape}"))

    def _no_smaller(self, reason: str) -> str:
        return (
            f"score_view_fraction={self._fraction}, but {reason}, so there are no two sizes to "
            f"train at. Pass scoring=ScoringConfig(image_size=...) below the size that is trained, "
            f"or a transform that gives smaller images than train_transform."
        )


def small_part(batch: Columns) -> Columns:
    """Returns the columns of the small part under their plain names; none without such a part."""
    return {
        name.removeprefix(_PREFIX): column
        for name, column in batch.items()
        if name.startswith(_PREFIX)
    }


def _shapes(batch: Columns, name: str) -> dict[str, tuple[int, ...]]:
    view: Any = view_of(batch, name)
    tensors = view if isinstance(view, Mapping) else {"": view}
    return {key: tuple(tensor.shape[1:]) for key, tensor in tensors.items()}
