"""Which views are made of an example, from what, and how: decided once, alike on every rank.

In: the transforms as the user gave them. Out: a `Recipe`. What has to be tried is tried on a
picture of our own, not on data, so that the answer depends on the transforms alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jest_stream.errors import ConfigError
from jest_stream.randomness import isolated_rng
from jest_stream.views.compose import PixelTable, Reduction, SplitCompose, split_compose
from jest_stream.views.metadata import Key
from jest_stream.views.rows import Transform

TrainViewFrom = Literal["auto", "encoded", "score_view"]
ReducedDecoding = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How views are made. Transforms that are known are taken apart (`SplitCompose`)."""

    transform: Transform | None
    reference_transform: Transform | None
    train_transform: Transform | None
    train_view_from: Literal["encoded", "score_view"] | None
    """What the train view is made of. None: it is the score view."""
    reduction: Reduction | None
    """How far images may be reduced while they are decoded for scoring. None: not at all."""

    def pixel_tables(self) -> dict[str, PixelTable]:
        """Returns what is left to do to the pixels of each view that is uint8 on its way."""
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
        """Returns what was decided, for `repr`."""
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
      image_key: where the image is; a function is never given a reduced one.
      train_view_from: what the train view is made of. `"auto"`: of the score view where that has
        its size and is uint8 on its way, else of the encoded image.
      reduced_decoding: whether JPEGs are decoded reduced for scoring. `"auto"`: where that is
        known to suffice, and the train view is made of the encoded image.

    Raises:
      ConfigError: for what was asked for and cannot be.
    """
    known = {name: split_compose(transform) or transform for name, transform in transforms.items()}
    origin = _origin(known, train_view_from)
    is_reduced = origin == "encoded" if reduced_decoding == "auto" else reduced_decoding
    reduction = _reduction(known, image_key) if is_reduced else None
    if reduced_decoding is True and reduction is None:
        raise ConfigError(
            "reduced_decoding=True needs to know what size is wanted: transform, and "
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
    # Decoding the chosen once more would cost more than it saves.
    score, train = (_made(known[name]) for name in ("transform", "train_transform"))
    if score is None or train is None or score.dtype != torch.uint8:
        return "encoded"
    return "score_view" if score.shape[-2:] == train.shape[-2:] else "encoded"


def _reduction(known: Mapping[str, Any], image_key: Key) -> Reduction | None:
    if callable(image_key):
        return None
    resizes = []
    for name in ("transform", "reference_transform"):
        transform = known[name]
        if transform is None and name == "reference_transform":
            continue
        if not isinstance(transform, SplitCompose) or transform.resize is None:
            return None
        resizes.append(transform.resize)
    return Reduction(tuple(resizes))


def _made(transform: Transform) -> Tensor | None:
    """Returns what becomes of a picture of our own; None if that is no tensor, or nothing."""
    from PIL import Image

    ramp = np.arange(384 * 512 * 3, dtype=np.uint32).reshape(384, 512, 3) % 251
    with isolated_rng("train_view_from"):
        try:
            made = transform(Image.fromarray(ramp.astype(np.uint8)))
        except Exception:  # not made for such pictures: nothing is known of its size
            return None
    return made if isinstance(made, Tensor) else None
