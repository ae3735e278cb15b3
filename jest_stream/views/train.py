"""The random view that is trained on, made from the encoded bytes of the few that were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jest_stream.randomness import isolated_rng
from jest_stream.sources.decode import DEFAULT_LIMITS, Decoded, Limits
from jest_stream.views.columns import View, collate, view_of
from jest_stream.views.rows import Row, Transform, add_view, as_rgb


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """Makes the random view that is trained on, for the chosen examples only."""

    transform: Transform
    seed: int
    rank: int
    limits: Limits = DEFAULT_LIMITS
    """The largest images that are decoded."""

    def __call__(self, raw_images: list[Any], *, step: int) -> View:
        """Returns the stacked views; the same ones for the same `seed` and `step`."""
        rows = []
        with isolated_rng("train_view", self.seed, self.rank, step):
            for name, value in raw_images:
                row: Row = {"key": f"of step {step}"}
                image = as_rgb(Decoded({name: value}, self.limits)[name], self.limits)
                add_view(row, "image", self.transform(image), argument="train_transform")
                rows.append(row)
        return view_of(collate(rows), "image")
