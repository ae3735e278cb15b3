"""Scores image-text pairs: their value to training, from their losses under two models.

A score is a function of two tiles, the learner's and the reference's pair losses in nats. Those
known by name are weighted sums; for these no tile of scores is ever made, and a model of weight
zero is not looked at. Pure functions, no randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from jest_stream.config import SCORE_NAMES, ScoreFunction
from jest_stream.errors import ConfigError


@dataclass(frozen=True)
class WeightedScore:
    """A weighted sum of the learner's and the reference's pair losses."""

    learner_weight: float
    """Factor on the learner's loss. 0: no learner is needed."""
    reference_weight: float
    """Factor on the reference's loss; negative to prefer pairs that the reference finds easy."""

    def __post_init__(self) -> None:
        weights = (self.learner_weight, self.reference_weight)
        if not all(math.isfinite(weight) for weight in weights) or weights == (0, 0):
            raise ConfigError(
                f"WeightedScore needs finite weights that are not both 0, got {weights}. "
                f"WeightedScore(1, -1) is learnability."
            )

    def __call__(self, learner_loss: Tensor, reference_loss: Tensor) -> Tensor:
        """Returns the score of each pair, in the shape of the tiles."""
        return self.learner_weight * learner_loss + self.reference_weight * reference_loss


learnability = WeightedScore(1.0, -1.0)
"""Learner loss minus reference loss: pairs that the reference finds easy and the learner does not
yet. Noise (hard for both) and the known (easy for both) score low. The paper's default."""
easy_reference = WeightedScore(0.0, -1.0)
"""Minus the reference loss: pairs that the reference finds easy. Needs no learner."""
hard_learner = WeightedScore(1.0, 0.0)
"""The learner loss: pairs that the learner finds hard, noise included. Needs no reference."""

_BY_NAME = dict(zip(SCORE_NAMES, (learnability, easy_reference, hard_learner), strict=True))


def resolve_score(score: str | ScoreFunction) -> ScoreFunction:
    """Returns the function of a name; a function is returned as it is.

    Raises:
      ConfigError: if the name is none of ours.
    """
    if callable(score):
        return score
    if score not in _BY_NAME:
        names = ", ".join(repr(name) for name in _BY_NAME)
        raise ConfigError(
            f"score must be one of {names} or a function of two pair-loss tiles, got {score!r}"
        )
    return _BY_NAME[score]


def needs(score: str | ScoreFunction) -> tuple[bool, bool]:
    """Returns whether the score needs a learner, and whether it needs a reference.

    A function of one's own is taken to need both; a `WeightedScore` needs those it weighs.
    """
    function = resolve_score(score)
    if isinstance(function, WeightedScore):
        return function.learner_weight != 0, function.reference_weight != 0
    return True, True


def score_tile(score: ScoreFunction, learner_loss: Tensor, reference_loss: Tensor) -> Tensor:
    """Returns the score of each pair by the user's function, its shape checked.

    Raises:
      ConfigError: if the result is not a tensor of the tiles' shape.
    """
    tile = score(learner_loss, reference_loss)
    shape = getattr(tile, "shape", None)
    if shape != learner_loss.shape:
        got = type(tile).__name__ if shape is None else f"shape {list(shape)}"
        raise ConfigError(
            f"score must return a tensor of the shape of the two pair-loss tiles, "
            f"{list(learner_loss.shape)}, got {got}. It is called on tiles of any shape and must "
            f"treat each pair alone: no sums, means or indexing."
        )
    return tile
