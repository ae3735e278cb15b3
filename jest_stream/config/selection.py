"""Defines `SelectionConfig`, the rule by which sub-batches are chosen, and its parts.

`Term` and `TargetSimilarity` add to an example's score, `Quota` bounds a group. Frozen and checked
when made. Scores are in nats, as losses are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from jest_stream.config.checks import (
    as_finite,
    as_integer,
    as_number,
    as_optional_integer,
    require_one_of,
    require_share,
    set_field,
)
from jest_stream.errors import ConfigError

Method = Literal["joint", "independent", "uniform"]
Loss = Literal["auto", "sigmoid", "softmax"]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""Score of each pair of a tile, from the learner's and the reference's pair losses."""
Metadata = str | Callable[[Mapping[str, Any]], Any]
"""A member of the example or an entry of its `json`; or a function of the decoded example."""

SCORE_NAMES = ("learnability", "easy_reference", "hard_learner")
"""The scores known by name; `selection.scores` makes them, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A number of the example's metadata, such as its quality, added to its score."""

    value: Metadata
    """Where the number is. Finite, or else the example is a bad one."""
    weight: float = 1.0
    """Factor on the number; the product counts as nats, before the gain."""

    def __post_init__(self) -> None:
        set_field(self, "weight", as_finite("Term.weight", self.weight))
        if not isinstance(self.value, str) and not callable(self.value):
            raise ConfigError(
                f"Term.value must be a metadata key or a function of the decoded example, got "
                f"{self.value!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetSimilarity:
    """The similarity of an example, as the reference embeds it, to examples of the user's task.

    NormSim of Wang et al., NeurIPS 2024 (https://arxiv.org/abs/2405.19547): the norm of the
    example's cosine similarities to all targets.
    """

    targets: Tensor
    """`[T, D]` embeddings of the targets, by the same tower of the reference; of any norm."""
    weight: float = 1.0
    """Factor on the similarity; the product counts as nats, before the gain."""
    tower: Literal["image", "text"] = "image"
    """The embedding of the example that is compared. The paper's is the image's."""
    norm: float = math.inf
    """Infinity: the similarity to the nearest target. 2: the root of the sum of their squares."""

    def __post_init__(self) -> None:
        set_field(self, "weight", as_finite("TargetSimilarity.weight", self.weight))
        require_one_of("TargetSimilarity.tower", self.tower, ("image", "text"))
        if self.norm not in (2, math.inf):
            raise ConfigError(f"TargetSimilarity.norm must be 2 or infinity, got {self.norm}")
        targets = self.targets
        if targets.dim() != 2 or 0 in targets.shape or not targets.is_floating_point():
            raise ConfigError(
                f"TargetSimilarity.targets must be [T, D] floating point, one embedding a row, got "
                f"{list(targets.shape)} {targets.dtype}."
            )
        if not targets.isfinite().all() or not targets.any(dim=1).all():
            raise ConfigError(
                "TargetSimilarity.targets hold NaN, infinity or a row of zeros, which has no "
                "direction. Leave such targets out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """Bounds on the part of a sub-batch that one group of examples makes up.

    They become numbers of examples: a floor is rounded up, a cap down, and a share to either side
    (see `quota_sizes`).
    """

    floor: float = 0.0
    """Least share. Met as long as the super-batch holds enough of the group."""
    cap: float = 1.0
    """Largest share. Kept as long as other groups hold enough to fill the sub-batch."""
    share: float | None = None
    """Target share: floor and cap in one."""

    def __post_init__(self) -> None:
        require_share("Quota.floor", self.floor)
        require_share("Quota.cap", self.cap)
        if self.share is not None:
            require_share("Quota.share", self.share)
        # A share sets both bounds, so neither may be set beside it: (0, 1) are their defaults.
        if self.share is not None and (self.floor, self.cap) != (0, 1):
            raise ConfigError(
                f"Quota.share={self.share} is floor and cap in one, got floor={self.floor} and "
                f"cap={self.cap} besides. Pass the one or the two."
            )
        if self.floor > self.cap:
            raise ConfigError(f"Quota.floor={self.floor} is above cap={self.cap}.")

    @property
    def least(self) -> float:
        """The share that the group must make up."""
        return self.floor if self.share is None else self.share

    @property
    def most(self) -> float:
        """The share that the group may make up."""
        return self.cap if self.share is None else self.share


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """The rule by which a sub-batch is chosen from a super-batch."""

    method: Method = "joint"
    """`joint` is JEST; `independent` scores each example alone; `uniform` skips scoring: the
    baseline that reads the same stream."""
    score: str | ScoreFunction = "learnability"
    """`learnability` (learner loss - reference loss), `easy_reference` (minus reference loss, no
    learner pass), `hard_learner` (learner loss, no reference), a `WeightedScore`, or a function of
    the two tiles of pair losses."""
    terms: tuple[Term | TargetSimilarity, ...] = ()
    """Terms added to the score of each example."""
    num_chunks: int = 16
    """Sequential draws, each conditioned on those before; no more than the batch has examples.
    16 is the paper's default, 1 is independent selection."""
    num_sweeps: int = 0
    """Times that all chunks are drawn again, one at a time given all others: without sweeps the
    first chunks, drawn alone, steer the rest. Each sweep costs one more selection, next to nothing
    beside scoring; 2 are enough."""
    gain: float = 1.0
    """Factor on the scores before sampling. Larger is greedier; infinity takes the best."""
    effective_support: float | None = None
    """Instead of a gain: the number of candidates that each chunk is effectively drawn from,
    1 / sum(p^2). The gain that gives it is found for each chunk."""
    uniform_fraction: float = 0.0
    """Share of each sub-batch that is drawn uniformly: coverage, and an unbiased control."""
    group_by: Metadata | tuple[str, ...] | None = None
    """The example's group: its value under a key, a tuple of values for several keys, or the result
    of a function."""
    quotas: Mapping[Hashable, Quota] | None = None
    """Bounds by group. Groups without an entry are not bounded."""
    loss: Loss = "auto"
    """Family of the pair losses. `auto`: sigmoid if those of learner and reference that the score
    needs have a bias; else softmax."""
    start_step: int = 0
    """First step whose batch is selected; earlier ones are uniform and score nothing."""
    stop_step: int | None = None
    """First step whose batch is uniform again. None: selection never stops."""

    def __post_init__(self) -> None:
        require_one_of("selection.method", self.method, ("joint", "independent", "uniform"))
        require_one_of("selection.loss", self.loss, ("auto", "sigmoid", "softmax"))
        if not callable(self.score):
            require_one_of("selection.score", self.score, SCORE_NAMES, "or a function of two tiles")
        set_field(self, "num_chunks", as_integer("selection.num_chunks", self.num_chunks, 1))
        set_field(self, "num_sweeps", as_integer("selection.num_sweeps", self.num_sweeps, 0))
        set_field(self, "start_step", as_integer("selection.start_step", self.start_step, 0))
        stop_step = as_optional_integer("selection.stop_step", self.stop_step, 0)
        set_field(self, "stop_step", stop_step)
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ConfigError(
                f"selection.stop_step={self.stop_step} is not after "
                f"start_step={self.start_step}, so nothing would ever be selected. Use "
                f"method='uniform' for that."
            )
        require_sampling("selection.", self.gain, self.effective_support, self.uniform_fraction)
        _require_terms(self.terms)
        _require_groups(self.group_by, self.quotas)


def require_sampling(
    prefix: str, gain: float, effective_support: float | None, uniform_fraction: float
) -> None:
    """Raises `ConfigError` unless examples can be drawn like this.

    `select_jointly` and its baselines take the same three; `prefix` precedes the names in messages.
    """
    if not as_number(f"{prefix}gain", gain) > 0:
        raise ConfigError(
            f"{prefix}gain must be above 0, got {gain}: it multiplies the scores before sampling. "
            f"For a choice that ignores them use method='uniform', or select_uniformly."
        )
    if effective_support is not None:
        if gain != 1:  # 1 is the default, so a user has set both
            raise ConfigError(
                f"{prefix}effective_support={effective_support} finds the gain, but gain={gain} is "
                f"given too. Pass one of the two."
            )
        if not 1 <= as_number(f"{prefix}effective_support", effective_support) < math.inf:
            raise ConfigError(
                f"{prefix}effective_support must be a finite number of at least 1, got "
                f"{effective_support}: 1 is the greediest."
            )
    if not 0 <= as_number(f"{prefix}uniform_fraction", uniform_fraction) < 1:
        raise ConfigError(
            f"{prefix}uniform_fraction must be in [0, 1), got {uniform_fraction}. For all of the "
            f"batch use method='uniform', or select_uniformly."
        )


def require_quotas(quotas: Mapping[Hashable, Quota]) -> None:
    """Raises `ConfigError` for values that are no quotas, and for floors above 1 together."""
    for group, quota in quotas.items():
        if not isinstance(quota, Quota):
            raise ConfigError(f"quotas must be Quota objects, got {quota!r} for group {group!r}.")
    total = sum(quota.least for quota in quotas.values())
    if total > 1 + 1e-9:  # twenty floors of 0.05 add up to 1.0000000000000002
        raise ConfigError(
            f"the floors and shares of the quotas add up to {total:.4g}, more than there is room "
            f"for: all groups together make up 1. Lower some of them."
        )


def _require_terms(terms: object) -> None:
    if not isinstance(terms, tuple) or not all(
        isinstance(term, Term | TargetSimilarity) for term in terms
    ):
        raise ConfigError(
            f"selection.terms must be a tuple of Term and TargetSimilarity, got {terms!r}. One "
            f"term is written (Term(value='quality'),)."
        )


def _require_groups(group_by: object, quotas: Mapping[Hashable, Quota] | None) -> None:
    if (group_by is None) != (quotas is None):
        raise ConfigError(
            f"selection.group_by and selection.quotas need each other, got group_by={group_by!r} "
            f"and quotas={quotas!r}."
        )
    if quotas is None:
        return
    # Three forms are accepted: one key, several keys, a function. See `SelectionConfig.group_by`.
    is_keys = isinstance(group_by, tuple) and all(isinstance(key, str) for key in group_by)
    if not (isinstance(group_by, str) or callable(group_by) or is_keys):
        raise ConfigError(
            f"selection.group_by must be a metadata key, a tuple of them or a function of the "
            f"decoded example, got {group_by!r}"
        )
    require_quotas(quotas)
