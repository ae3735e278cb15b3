"""Decides once how views are made: their transforms, and the images that they start from.

In: the transforms as the user gave them. Out: a `Recipe`, the same on every rank: transforms are
tried on a fixed picture, not on data, so that the answer depends on them alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jest_stream.config import Key, ReducedDecoding, TrainViewFrom, Transform
from jest_stream.errors import ConfigError
from jest_stream.randomness import isolated_rng
from jest_stream.views.compose import PixelTable, Reduction, SplitCompose, split_compose


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Tells how views are made. Known transforms are split in two (`SplitCompose`)."""

    transform: Transform | None
    reference_transform: Transform | None
    train_transform: Transform | None
    train_view_from: Literal["encoded", "score_view"] | None
    """The image that the train view is made of. None: the score view itself is trained on."""
    reduction: Reduction | None
    """Tells how far images may be reduced while they are decoded for scoring. None: not at all."""

    def pixel_tables(self) -> dict[str, PixelTable]:
        """Returns the tables that finish views of uint8 pixels, by the name of the view."""
        transforms = {
            "image": self.transform,
            "reference_image": self.reference_transform,
            "train": self.train_transform,
        }
        found = {
            name: transform.pixel_table()
            for name, transform in transforms.items()
            if isinstance(transform, SplitCompose)
        }
        return {name: finish for name, finish in found.items() if finish is not None}

    def describe(self) -> list[str]:
        """Returns the decisions, for `repr`."""
        shown = {
            "encoded": ["train view from encoded images"],
            "score_view": ["train view from the score view"],
            None: [],
        }[self.train_view_from]
        return [*shown, "reduced decoding"] if self.reduction is not None else shown


def make_recipe(
    transforms: Mapping[str, Transform | None],
    *,
    image_key: Key,
    train_view_from: TrainViewFrom,
    reduced_decoding: ReducedDecoding,
) -> Recipe:
    """Returns how to make the views.

    Args:
      transforms: `transform`, `reference_transform` and `train_transform`.
      image_key: the member with the image. A function of the user's is never given a reduced one.
      train_view_from: the image that the train view is made of. `"auto"`: the score view where
        that has its size and is uint8, else the encoded image.
      reduced_decoding: whether JPEGs are decoded reduced for scoring. `"auto"`: where that is
        known to suffice, and the train view is made of the encoded image.

    Raises:
      ConfigError: for settings that cannot be met.
    """
    known = {name: split_compose(transform) or transform for name, transform in transforms.items()}
    origin = _origin(known, train_view_from)
    is_reduced = origin == "encoded" if reduced_decoding == "auto" else reduced_decoding
    reduction = _reduction(known, image_key) if is_reduced else None
    if reduced_decoding is True and reduction is None:
        raise ConfigError(
            "reduced_decoding=True needs to know the size that is wanted: transform, and "
            "reference_transform if there is one, must be a Compose of torchvision that begins "
            "with a smooth Resize of PIL images, and image_key the name of a member. Pass such a "
            'transform, or reduced_decoding="auto".'
        )
    return Recipe(
        transform=known["transform"],
        reference_transform=known["reference_transform"],
        train_transform=known["train_transform"],
        train_view_from=origin,
        reduction=reduction,
    )


def _origin(
    known: Mapping[str, Any], wanted: TrainViewFrom
) -> Literal["encoded", "score_view"] | None:
    # There are five cases: 1. no train view to make. 2. The user decided. 3. A transform of unknown
    # kind: its views may be anything. 4. Views that are no uint8, or whose size differs from the
    # train view's: the encoded image. 5. Equal sizes: the score view.
    if known["train_transform"] is None:
        if wanted != "auto":
            raise ConfigError(
                f"train_view_from={wanted!r} says what train_transform is given, but there is "
                f"none. Pass train_transform=, or leave it out."
            )
        return None
    if wanted != "auto":
        return wanted
    if not isinstance(known["transform"], SplitCompose):
        return "encoded"
    # At equal sizes, decoding the chosen once more costs more than it saves: on JPEGs of 500 px,
    # five candidates per chosen, 224 px views gave 0.87 times the examples/s.
    score, train = (_made(known[name]) for name in ("transform", "train_transform"))
    if score is None or train is None or score.dtype != torch.uint8:
        return "encoded"
    return "score_view" if score.shape[-2:] == train.shape[-2:] else "encoded"


def _reduction(known: Mapping[str, Any], image_key: Key) -> Reduction | None:
    if callable(image_key):
        return None
    # Every view of a candidate is made of the one decoded image: all must be resized first.
    resizes = []
    for name in ("transform", "reference_transform"):
        transform = known[name]
        if transform is None and name == "reference_transform":
            continue  # the reference is given the learner's view
        if not isinstance(transform, SplitCompose) or transform.resize is None:
            return None
        resizes.append(transform.resize)
    return Reduction(tuple(resizes))


def _made(transform: Transform) -> Tensor | None:
    """Returns the view of a fixed picture; None if it is no tensor, or the transform fails."""
    from PIL import Image

    # A width and a height that differ, and no two rows alike; 251 is prime.
    ramp = np.arange(384 * 512 * 3, dtype=np.uint32).reshape(384, 512, 3) % 251
    with isolated_rng("train_view_from"):
        try:
            made = transform(Image.fromarray(ramp.astype(np.uint8)))
        except Exception:  # not meant for such pictures: the size of its views stays unknown
            return None
    return made if isinstance(made, Tensor) else None
