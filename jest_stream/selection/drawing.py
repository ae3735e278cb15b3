"""The loop over chunks: how examples are drawn once their scores are known.

In: scores that can be conditioned on what was drawn, and a `DrawRule`. Out: a `Selection`. Every
chunk is drawn in up to two draws, first the uniform picks, then those by score, both without
replacement from one `Urn`; quotas bind all draws alike.

B: candidates, b: batch size, C: chunks, G: groups with a quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jest_stream.config import require_sampling
from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.selection.checks import Candidates, check_terms
from jest_stream.selection.conditional import ConditionalScores, take
from jest_stream.selection.quotas import Bounds, Groups
from jest_stream.selection.sampling import (
    effective_support,
    gain_for_support,
    gumbel_noise,
    inclusion_probabilities,
    inverse_probability_weights,
    scaled_logits,
    uniform_sizes,
)
from jest_stream.types import Selection


@dataclass(frozen=True, kw_only=True)
class DrawRule:
    """How examples of one super-batch are drawn by their scores."""

    gain: float = 1.0
    """Factor on the scores before sampling. Larger is greedier; infinity takes the best."""
    effective_support: float | None = None
    """Instead of a gain: among how many candidates each chunk is really chosen, 1 / sum(p^2)."""
    terms: Tensor | None = None
    """`[B]` nats that are added to the score of each example, before the gain."""
    uniform_fraction: float = 0.0
    """Share of the sub-batch that is drawn uniformly from what is left when its chunk begins."""
    groups: Groups | None = None
    """Bounds on how many of a group are drawn, by score or uniformly."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what cannot be drawn by."""
        require_sampling("", self.gain, self.effective_support, self.uniform_fraction)


PLAIN = DrawRule()
"""The paper's: in proportion to exp(score)."""


class Urn:
    """The candidates, drawn from without replacement. Remembers what was drawn, and how likely."""

    def __init__(
        self,
        num_examples: int,
        sizes: Sequence[int],
        groups: Groups | None = None,
        *,
        device: torch.device | None,
    ) -> None:
        """Raises `ConfigError` if there is not one label per candidate."""
        if groups is not None and len(groups.labels) != num_examples:
            raise ConfigError(
                f"labels must name the group of each of the {num_examples} candidates, got "
                f"{len(groups.labels)} labels."
            )
        self.positions = torch.arange(num_examples, device=device)
        self._sizes = sizes
        self._bounds: Bounds | None = None
        if groups is not None:
            self._bounds = Bounds(groups, sizes, device=self.positions.device)
        self._is_drawn = torch.zeros_like(self.positions, dtype=torch.bool)
        self._drawn: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        """Per draw, how likely each of its examples was drawn, given the others' noise: `[n]`."""

    def left(self, scores: Tensor) -> Tensor:
        """Returns the scores, -inf for candidates that were drawn: `[B]`."""
        return scores.masked_fill(self._is_drawn, -torch.inf)

    def draw(self, scores: Tensor, *, gain: Tensor | float, noise: Tensor) -> Tensor:
        """Returns the candidates of the next draw, in draw order: `[n]` int64.

        Args:
          scores: `[B]`, finite.
          gain: factor on them, which may be infinite.
          noise: `[B]` float64, standard Gumbel.
        """
        draw = len(self._drawn)
        # The order of gain * scores + noise, defined for an infinite gain too. The noise makes it
        # float64, in which scores of thousands do not swallow the noise.
        keys = self.left(scores) + noise / gain
        if self._bounds is None:
            drawn = keys.topk(self._sizes[draw]).indices
            thresholds = keys.index_fill(0, drawn, -torch.inf).amax().expand(len(drawn))
        else:
            drawn = self._bounds.restrict(keys, draw).topk(self._sizes[draw]).indices
            drawn = drawn[keys[drawn].argsort(descending=True)]
            self._bounds.count(drawn)
            left = keys.index_fill(0, drawn, -torch.inf)
            thresholds = self._bounds.thresholds(left, drawn, draw)
        self.probabilities.append(inclusion_probabilities(scores[drawn], thresholds, gain))
        self._is_drawn.index_fill_(0, drawn, True)
        self._drawn.append(drawn)
        return drawn

    def selection(
        self,
        *,
        effective_support: Tensor,
        selected_score: Tensor,
        candidate_score: Tensor,
        is_finite: Tensor,
    ) -> Selection:
        """Returns all that was drawn, with what is known of it."""
        weights = torch.cat([inverse_probability_weights(p) for p in self.probabilities])
        nothing = self.positions[:0]
        counts, excess = (nothing, nothing) if self._bounds is None else self._bounds.tally()
        return Selection(
            indices=torch.cat(self._drawn),
            weights=weights.float(),
            effective_support=effective_support,
            selected_score=selected_score,
            candidate_score=candidate_score,
            group_counts=counts,
            quota_excess=excess,
            is_finite=is_finite,
        )


def draw(
    conditional: ConditionalScores,
    candidates: Candidates,
    *,
    sizes: Sequence[int],
    rule: DrawRule,
    key: int,
    step: int,
) -> Selection:
    """Returns the examples drawn chunk by chunk, each chunk conditioned on those before.

    Args:
      conditional: scores given the chosen; updated.
      sizes: examples per chunk.
    """
    plan = list(zip(uniform_sizes(sizes, rule.uniform_fraction), sizes, strict=True))
    draws = [size for num_uniform, total in plan for size in (num_uniform, total - num_uniform)]
    urn = Urn(
        candidates.num_examples, list(filter(None, draws)), rule.groups, device=candidates.device
    )
    terms = 0.0 if rule.terms is None else check_terms(rule.terms, candidates)
    is_finite, num_left = candidates.is_finite, candidates.num_examples
    offered, drawn_scores, supports = [], [], []
    for number, (num_uniform, size) in enumerate(plan):
        scores = conditional.scores() + terms
        is_finite = is_finite & scores.isfinite().all()
        left = urn.left(scores)
        offered.append(left.masked_fill(left.isneginf(), 0.0).sum() * (size / num_left))
        num_left -= size
        gain: Tensor | float = rule.gain
        if rule.effective_support is not None:
            gain = gain_for_support(rule.effective_support, left)
        supports.append(effective_support(scaled_logits(left, gain)))
        drawn = []
        if num_uniform:
            noise = gumbel_noise(key, step, ~number, urn.positions)  # no other draw's
            drawn.append(urn.draw(torch.zeros_like(scores), gain=1.0, noise=noise))
        if size > num_uniform:
            noise = gumbel_noise(key, step, number, urn.positions)
            drawn.append(urn.draw(scores, gain=gain, noise=noise))
        chunk = torch.cat(drawn)
        drawn_scores.append(scores[chunk])
        if number + 1 < len(sizes):
            conditional.condition_on(take(conditional.models, chunk))
    _require_finite(is_finite)
    return urn.selection(
        effective_support=torch.stack(supports).float(),
        selected_score=torch.cat(drawn_scores).mean(),
        candidate_score=torch.stack(offered).sum() / sum(sizes),
        is_finite=is_finite,
    )


def _require_finite(is_finite: Tensor) -> None:
    if is_finite.device.type == "cpu" and not is_finite:  # on a GPU the host would have to wait
        raise NonFiniteError(
            "scores hold NaN or infinity though the embeddings do not: a choice among them would "
            "mean nothing. Look for a logit_scale or logit_bias that has diverged, or at your own "
            "score function."
        )
