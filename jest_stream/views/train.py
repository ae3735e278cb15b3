"""Makes the random view that is trained on, for the few examples that were chosen. Pure.

The random state is set anew for each example, by run, rank, step and position in the batch: the
view does not depend on the process that makes it, nor on the others that are made there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jest_stream.config import DEFAULT_LIMITS, Limits, Transform
from jest_stream.errors import ConfigError, UserCodeError
from jest_stream.randomness import isolated_rng, seed_globally
from jest_stream.views.columns import Columns, collate, columns_of
from jest_stream.views.compose import as_picture
from jest_stream.views.decode import Decoded
from jest_stream.views.rows import Row, add_view, as_rgb

ARGUMENT = "train_transform"
"""The user's name for the transform that makes it."""


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """Makes the random views of some of the chosen examples of a batch."""

    transform: Transform
    seed: int
    rank: int
    is_of_score_view: bool = False
    """Whether `transform` is given the score view's pixels instead of the image that was read."""
    limits: Limits = DEFAULT_LIMITS
    """The largest images that are decoded."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the chosen that it takes."""
        return ("image" if self.is_of_score_view else "raw_image", "key", "shard")

    def __call__(
        self,
        chosen: Columns,
        *,
        step: int,
        positions: Sequence[int],
        note: Callable[[int, int], None] | None = None,
    ) -> Columns:
        """Returns the views, stacked, as the columns `image` or `image/...`.

        Args:
          chosen: `columns` of the chosen, on the CPU.
          step: of the batch.
          positions: the position in the batch of each of them.
          note: told step and position before each example.

        Raises:
          BadExampleError: for an image that cannot be decoded.
          ConfigError: for views that are no tensors, or of different shapes.
        """
        rows = []
        with isolated_rng():
            for index, position in enumerate(positions):
                if note is not None:
                    note(step, position)
                row: Row = {"key": chosen["key"][index]}
                image = self._image(chosen, index)
                # After decoding, which is not random, and just before the code that is.
                seed_globally("train_view", self.seed, self.rank, step, position)
                add_view(row, "image", self._transformed(image), argument=ARGUMENT)
                rows.append(row)
        return columns_of(collate(rows, argument=ARGUMENT), ("image",)) if rows else {}

    def _image(self, chosen: Columns, index: int) -> Any:
        key, shard = chosen["key"][index], chosen["shard"][index]
        if self.is_of_score_view:
            pixels = chosen.get("image")
            if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.dim() != 4:
                raise ConfigError(
                    'train_view_from="score_view" needs a score view of uint8 pixels, but '
                    f"transform made something else of {key!r}. Pass a transform that is a Compose "
                    "of torchvision, such as open_clip's preprocess_val, or one that returns uint8 "
                    'tensors; or train_view_from="encoded".'
                )
            return as_picture(pixels[index])
        name, value = chosen["raw_image"][index]
        example = {name: value, "__key__": key, "__shard__": shard}
        return as_rgb(Decoded(example, self.limits)[name], self.limits)

    def _transformed(self, image: Any) -> Any:
        try:
            return self.transform(image)
        except StopIteration as error:  # would end the training loop in silence
            raise UserCodeError("train_transform raised StopIteration") from error
