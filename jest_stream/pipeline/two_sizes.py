"""Batches of two sizes: which of the chosen are trained at the score view, and their columns.

Flexi-JEST trains a part of every sub-batch at the size that the learner copy scores at, so that
the model is good at both. Runs in the training thread. Shapes: b: batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jest_stream.config import ScoringConfig, finite
from jest_stream.errors import ConfigError
from jest_stream.pipeline.device import Choice, moved
from jest_stream.pipeline.super_batches import take_rows
from jest_stream.views import Columns, PixelTable, columns_of, put_view, scaled, view_of

_PREFIX = "small_"


def small_rows(batch_size: int, num_small: int) -> list[int]:
    """Returns which places of the draw order are trained small: evenly spread.

    So that every chunk of a sub-batch, first or last drawn, gives its share.
    """
    return [(2 * row + 1) * batch_size // (2 * num_small) for row in range(num_small)]


class TwoSizes:
    """Cuts a sub-batch in two: the train view of most, the score view of some."""

    def __init__(
        self,
        fraction: float,
        batch_size: int,
        scoring: ScoringConfig,
        finish: PixelTable | None = None,
    ) -> None:
        """Raises `ConfigError` unless both parts get an example.

        Args:
          fraction: share that is trained at the score view.
          batch_size: b; the share becomes a number of examples here.
          scoring: how that view is scored.
          finish: what is left to do to its pixels.
        """
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
        self._finish = finish
        self._fraction = fraction
        self._scoring = scoring

    @classmethod
    def of(
        cls,
        fraction: object,
        batch_size: int,
        scoring: ScoringConfig,
        *,
        has_train_view: bool,
        finish: PixelTable | None = None,
    ) -> TwoSizes | None:
        """Returns what cuts sub-batches; None if all are trained at one size (fraction 0).

        Raises:
          ConfigError: for a share that cannot be, or where both views are the same.
        """
        share = finite("score_view_fraction", fraction)
        if share == 0:
            return None
        two_sizes = cls(share, batch_size, scoring, finish)
        if not has_train_view and scoring.image_size is None and not scoring.changes_tokens:
            raise ConfigError(two_sizes._no_smaller("the score view is the train view"))
        return two_sizes

    def split(self, choice: Choice) -> tuple[Choice, Choice]:
        """Returns the part that gets the train view, and the part that stays at the score view.

        Only `indices` and `weights` are cut; what is said of the whole draw stays.
        """
        device = choice.on_device.indices.device
        if device not in self._places:
            self._places[device] = self._rest.to(device), self._small.to(device)
        rest, small = self._places[device]
        return choice.part(rest, self._rest), choice.part(small, self._small)

    def small(self, candidates: Columns, choice: Choice, device: torch.device) -> Columns:
        """Returns the columns of the small part, named `small_image`, ...

        Args:
          candidates: columns of the super-batch.
          choice: the small part of what was chosen of it.
          device: where the batch is wanted.
        """
        rows = take_rows(columns_of(candidates, ("image", "text", "key")), choice)
        view: Any = view_of(rows, "image")
        if self._finish is not None and isinstance(view, Tensor):
            view = self._finish(view)
        put_view(rows, "image", scaled(view, self._scoring.image_size))
        rows["weight"] = choice.weights(device)
        return {_PREFIX + name: moved(column, device) for name, column in rows.items()}

    def check(self, batch: Columns) -> None:
        """Raises `ConfigError` if both parts of a batch have images of one size, for nothing."""
        if self._scoring.changes_tokens:
            return
        large, small = _shapes(batch, "image"), _shapes(batch, _PREFIX + "image")
        if large == small:
            shape = " x ".join(str(side) for side in next(iter(small.values())))
            raise ConfigError(self._no_smaller(f"train view and score view are both {shape}"))

    def _no_smaller(self, what: str) -> str:
        return (
            f"score_view_fraction={self._fraction}, but {what}, so there are no two sizes to train "
            f"at. Pass scoring=ScoringConfig(image_size=...) below the size that is trained, or a "
            f"transform that gives smaller images than train_transform."
        )


def small_part(batch: Columns) -> Columns:
    """Returns the columns of the small part under their plain names; none if there is no such."""
    return {
        name.removeprefix(_PREFIX): column
        for name, column in batch.items()
        if name.startswith(_PREFIX)
    }


def _shapes(batch: Columns, name: str) -> dict[str, tuple[int, ...]]:
    view: Any = view_of(batch, name)
    tensors = view if isinstance(view, Mapping) else {"": view}
    return {key: tuple(tensor.shape[1:]) for key, tensor in tensors.items()}
