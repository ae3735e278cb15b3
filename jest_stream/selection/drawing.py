"""Draws examples chunk by chunk, once their scores are known.

Scores that can be conditioned on drawn examples and a `DrawRule` go in; a `Selection` comes out.
Every chunk is made by up to two draws, first its uniform picks, then those by score, all without
replacement from one `Urn`; quotas bind all draws alike. Sweeps then put one chunk after the other
back and draw it again, given all the others.

B: candidates, b: batch size, C: chunks, G: groups with a quota, n: examples of a draw or a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class DrawRule:
    """How examples of one super-batch are drawn by their scores."""

    gain: float = 1.0
    """Factor on the scores before sampling. Larger is greedier; infinity takes the best."""
    effective_support: float | None = None
    """Instead of a gain: among how many candidates each chunk is really chosen, 1 / sum(p^2)."""
    terms: Tensor | None = None
    """`[B]` nats that are added to the score of each example, before the gain."""
    uniform_fraction: float = 0.0
    """Share of the sub-batch that is drawn uniformly, from all that is left as a chunk begins."""
    groups: Groups | None = None
    """Bounds on how many of a group are drawn, by score or uniformly."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for settings that allow no draw."""
        require_sampling("", self.gain, self.effective_support, self.uniform_fraction)


PLAIN = DrawRule()
"""The paper's rule: in proportion to exp(score)."""


class Urn:
    """The candidates, drawn from without replacement. Remembers each draw and how likely it was."""

    def __init__(
        self,
        num_examples: int,
        sizes: Sequence[int],
        groups: Groups | None = None,
        *,
        device: torch.device | None,
    ) -> None:
        """Raises `ConfigError` if the labels are not one per candidate."""
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
        self.drawn: dict[int, Tensor] = {}
        """By draw: the candidates that it took, in draw order: `[n]` int64."""
        self.probabilities: dict[int, Tensor] = {}
        """By draw: how likely each of those was drawn, given the others' noise: `[n]` float64."""
        self.num_left = num_examples
        """How many candidates are not drawn."""

    def left(self, scores: Tensor) -> Tensor:
        """Returns the scores, -inf for candidates that are drawn: `[B]`."""
        return scores.masked_fill(self._is_drawn, -torch.inf)

    def draw(self, draw: int, scores: Tensor, *, gain: Tensor | float, noise: Tensor) -> Tensor:
        """Returns the candidates that a draw takes, in draw order: `[n]` int64.

        Args:
          draw: number of the draw; each in turn, or one that was put back.
          scores: `[B]`, finite.
          gain: factor on them, which may be infinite.
          noise: `[B]` float64, standard Gumbel.
        """
        size = self._sizes[draw]
        # The order of gain * scores + noise, defined for an infinite gain too. The noise makes it
        # float64, in which scores of thousands do not swallow the noise.
        keys = self.left(scores) + noise / gain
        if self._bounds is None:
            # The k largest keys. The best of those left out is the threshold of all.
            drawn = keys.topk(size).indices
            thresholds = keys.index_fill(0, drawn, -torch.inf).amax().expand(size)
        else:
            # In turn a draw keeps to the bounds after it. Made again, once all were made, it need
            # keep only to those of the whole sub-batch, the last.
            bound = -1 if len(self.drawn) == len(self._sizes) else draw
            # `restrict` puts candidates at +inf and -inf; the order is that of their own keys.
            drawn = self._bounds.restrict(keys, bound).topk(size).indices
            drawn = drawn[keys[drawn].argsort(descending=True)]
            self._bounds.count(drawn)
            left = keys.index_fill(0, drawn, -torch.inf)
            thresholds = self._bounds.thresholds(left, drawn, bound)
        self.probabilities[draw] = inclusion_probabilities(scores[drawn], thresholds, gain)
        self._is_drawn.index_fill_(0, drawn, True)
        self.drawn[draw] = drawn
        self.num_left -= size
        return drawn

    def put_back(self, draw: int) -> None:
        """Puts back the candidates of a draw, once all draws were made; it is to be made again."""
        assert len(self.drawn) == len(self._sizes)
        drawn = self.drawn[draw]
        if self._bounds is not None:
            self._bounds.count(drawn, back=True)
        self._is_drawn.index_fill_(0, drawn, False)
        self.num_left += len(drawn)

    def selection(
        self,
        *,
        effective_support: Tensor,
        selected_score: Tensor,
        candidate_score: Tensor,
        is_finite: Tensor,
    ) -> Selection:
        """Returns all drawn candidates, with the observations of the draws."""
        draws = range(len(self._sizes))
        # Scaled draw by draw: each estimates a mean over the candidates that were left to it.
        weights = torch.cat([inverse_probability_weights(self.probabilities[d]) for d in draws])
        nothing = self.positions[:0]
        counts, excess = (nothing, nothing) if self._bounds is None else self._bounds.tally()
        return Selection(
            indices=torch.cat([self.drawn[draw] for draw in draws]),
            weights=weights.float(),
            effective_support=effective_support,
            selected_score=selected_score,
            candidate_score=candidate_score,
            group_counts=counts,
            quota_excess=excess,
            is_finite=is_finite,
        )


@dataclass(frozen=True)
class _Chunk:
    """The draws that make one chunk, by their numbers in the urn."""

    uniform: int | None
    """The draw of its uniform picks; None without any."""
    scored: int | None
    """The draw by score; None if all of it are uniform picks."""

    def members(self, urn: Urn) -> Tensor:
        """Returns the candidates that make up the chunk: `[n]` int64."""
        draws = [draw for draw in (self.uniform, self.scored) if draw is not None]
        return torch.cat([urn.drawn[draw] for draw in draws])


class _Observed(NamedTuple):
    """Observations of a chunk as it was drawn last, for metrics."""

    effective_support: Tensor
    drawn_scores: Tensor
    """`[n]` of its members."""
    mean_offered: Tensor
    """Mean score of the candidates that were left."""


def draw(
    conditional: ConditionalScores,
    candidates: Candidates,
    *,
    sizes: Sequence[int],
    rule: DrawRule,
    num_sweeps: int = 0,
    key: int,
    step: int,
) -> Selection:
    """Returns the examples drawn chunk by chunk, each chunk conditioned on those before.

    Args:
      conditional: scores given the chosen; updated. With sweeps, made with `forgets`.
      sizes: examples per chunk.
      num_sweeps: how often every chunk is put back and drawn again given all others, its uniform
        picks excepted.
    """
    chunks, draws = _planned(sizes, uniform_sizes(sizes, rule.uniform_fraction))
    urn = Urn(candidates.num_examples, draws, rule.groups, device=candidates.device)
    terms = 0.0 if rule.terms is None else check_terms(rule.terms, candidates)
    is_finite = candidates.is_finite
    observed: list[_Observed] = []
    # Three chunks and a sweep take six turns: 0 1 2, then 0 1 2 again. In turn 3 chunk 0 is the
    # oldest that the scores are conditioned on, so `forget` leaves them given chunks 1 and 2.
    num_turns = len(chunks) * (1 + num_sweeps)
    for turn in range(num_turns):
        number = turn % len(chunks)
        chunk, is_redrawn = chunks[number], turn >= len(chunks)
        if is_redrawn:
            conditional.forget()
        # A chunk of uniform picks only is drawn once: no score could change it.
        if chunk.scored is not None or not is_redrawn:
            scores = conditional.scores() + terms
            is_finite = is_finite & scores.isfinite().all()
            seen = _draw_chunk(urn, chunk, scores, rule, key=key, step=step, turn=turn)
            observed[number : number + 1] = [seen]
        if turn + 1 < num_turns:  # the last chunk conditions nothing
            conditional.condition_on(take(conditional.models, chunk.members(urn)))
    _require_finite(is_finite)
    shares = [size / sum(sizes) for size in sizes]
    offered = [o.mean_offered * share for o, share in zip(observed, shares, strict=True)]
    return urn.selection(
        effective_support=torch.stack([o.effective_support for o in observed]).float(),
        selected_score=torch.cat([o.drawn_scores for o in observed]).mean(),
        candidate_score=torch.stack(offered).sum(),
        is_finite=is_finite,
    )


def _draw_chunk(
    urn: Urn, chunk: _Chunk, scores: Tensor, rule: DrawRule, *, key: int, step: int, turn: int
) -> _Observed:
    """Makes the draws of a chunk; of one that was drawn before, only that by score.

    Args:
      scores: `[B]`, given the other chunks.
      turn: how many chunks were drawn so far, those drawn again included: names the noise.
    """
    if chunk.scored is not None and chunk.scored in urn.drawn:
        urn.put_back(chunk.scored)
    offered = urn.left(scores)
    mean_offered = offered.masked_fill(offered.isneginf(), 0.0).sum() / urn.num_left
    gain: Tensor | float = rule.gain
    if rule.effective_support is not None:
        gain = gain_for_support(rule.effective_support, offered)
    support = effective_support(scaled_logits(offered, gain))
    # Uniform picks come first: from all that is left, not from the leavings of the scored draw.
    if chunk.uniform is not None and chunk.uniform not in urn.drawn:
        # ~turn is -1, -2, ...: noise that no draw by score uses.
        noise = gumbel_noise(key, step, ~turn, urn.positions)
        urn.draw(chunk.uniform, torch.zeros_like(scores), gain=1.0, noise=noise)
    if chunk.scored is not None:
        noise = gumbel_noise(key, step, turn, urn.positions)
        urn.draw(chunk.scored, scores, gain=gain, noise=noise)
    return _Observed(support, scores[chunk.members(urn)], mean_offered)


def _planned(sizes: Sequence[int], uniform: Sequence[int]) -> tuple[list[_Chunk], list[int]]:
    """Returns the chunks and the sizes of their draws, none of them empty.

    For example, chunks of 3, 3 and 1 with 0, 1 and 1 uniform picks are made by draws of
    [3, 1, 2, 1]: `_Chunk(None, 0)`, `_Chunk(1, 2)`, `_Chunk(3, None)`.
    """
    chunks: list[_Chunk] = []
    draws: list[int] = []
    for size, num_uniform in zip(sizes, uniform, strict=True):
        numbers: list[int | None] = []
        for part in (num_uniform, size - num_uniform):
            numbers.append(len(draws) if part else None)
            draws += [part] if part else []
        chunks.append(_Chunk(*numbers))
    return chunks, draws


def _require_finite(is_finite: Tensor) -> None:
    if is_finite.device.type == "cpu" and not is_finite:  # on a GPU the host would have to wait
        raise NonFiniteError(
            "scores hold NaN or infinity though the embeddings do not: a choice among them would "
            "mean nothing. Look for a logit_scale or logit_bias that has diverged, or at your own "
            "score function."
        )
