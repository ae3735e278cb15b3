"""Scores of all candidates given the chunks drawn so far: one running vector, no `[B, B]`.

Each class holds what must survive from chunk to chunk and adds the pairs that a new chunk forms
with every candidate. Scores of candidates that were drawn already mean nothing. The new chunk is
handed over as embeddings, so that the candidates may be a part of the super-batch only.

B: candidates, C: examples of a chunk. `models` are the learner and the reference, or the one of
them that counts, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from jest_stream.config import ScoreFunction
from jest_stream.selection.losses import (
    LN2,
    add_exponentials,
    logit_tiles,
    negative_loss_sums,
    negative_losses,
    own_logits,
)
from jest_stream.selection.scores import WeightedScore, score_tile
from jest_stream.types import Embeddings


class ConditionalScores(Protocol):
    """Scores of the candidates, each given the examples chosen so far."""

    models: Sequence[Embeddings]
    """Whose embeddings of the chosen `condition_on` takes."""

    def scores(self) -> Tensor:
        """Returns the score of every candidate: `[B]` float32, in nats. Not to be modified."""

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Takes note of a chunk that was chosen: for each model, its `[C, D]` embeddings."""


class SigmoidScores:
    """Exact: S_kk + sum over chosen j of (S_kj + S_jk), for weighted sums of sigmoid losses."""

    def __init__(self, models: Sequence[Embeddings], weights: Sequence[float]) -> None:
        self.models = models
        self._weights = weights
        self._scores = torch.zeros_like(models[0].image[:, 0])
        for model, weight in zip(models, weights, strict=True):
            self._scores.add_(softplus(-own_logits(model, with_bias=True)), alpha=weight)

    def scores(self) -> Tensor:
        """Returns the running scores: `[B]`."""
        return self._scores

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the scores of the candidates' pairs with the chunk."""
        # All pairs are taken as negatives. That is wrong for an example and itself only, and so
        # for chosen candidates only: no mask is needed.
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses = negative_loss_sums(tile.logits, tile.scratch)
            self._scores[tile.rows].add_(losses, alpha=self._weights[tile.model])

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen, an example and itself excepted."""
        self.condition_on(self.models)
        for model, weight in zip(self.models, self._weights, strict=True):
            itself = softplus(own_logits(model, with_bias=True))
            self._scores.sub_(itself, alpha=2 * weight)


class OwnSigmoidScores:
    """As `SigmoidScores`, for any function of the learner's and the reference's pair losses."""

    def __init__(self, models: Sequence[Embeddings], score: ScoreFunction) -> None:
        self.models = models
        self._score = score
        learner, reference = (-own_logits(model, with_bias=True) for model in models)
        self._scores = self._score_own(learner, reference).float().clone()

    def scores(self) -> Tensor:
        """Returns the running scores: `[B]`."""
        return self._scores

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the scores of the candidates' pairs with the chunk."""
        losses: list[Tensor] = []
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses.append(negative_losses(tile.logits))
            if len(losses) == 2:  # the learner's and the reference's, of the same pairs
                self._scores[tile.rows] += score_tile(self._score, *losses).sum(1)
                losses.clear()

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen, an example and itself excepted."""
        self.condition_on(self.models)
        learner, reference = (own_logits(model, with_bias=True) for model in self.models)
        self._scores -= 2 * self._score_own(learner, reference)

    def _score_own(self, learner: Tensor, reference: Tensor) -> Tensor:
        """Returns the scores of pairs whose losses are the softplus of these: `[B]`."""
        losses = softplus(learner)[:, None], softplus(reference)[:, None]  # a tile of one column
        return score_tile(self._score, *losses)[:, 0]


class SoftmaxScores:
    """The candidate's own softmax loss, its denominators running over the examples chosen so far.

    Of image k, say: log(sum over chosen j of e^{x_kj}) - x_kk, averaged with the same of its
    text; the candidate itself is not in the sum. With none chosen: -x_kk. What the candidate would
    add to the losses of those chosen is left out: see `ExactSoftmaxScores`.
    """

    def __init__(self, models: Sequence[Embeddings], weights: Sequence[float]) -> None:
        self.models = models
        self._weights = weights
        self._own = [own_logits(model, with_bias=False) for model in models]
        self._sums: list[Tensor] | None = None  # [2, B] each: log2 of the sum, image and text

    def scores(self) -> Tensor:
        """Returns the scores that the running sums amount to: `[B]`."""
        total = torch.zeros_like(self._own[0])
        for model, weight in enumerate(self._weights):
            total.sub_(self._own[model], alpha=weight)
        # Where two models agree the sums cancel exactly, as long as the difference comes first.
        if self._sums is not None:
            sums = torch.zeros_like(self._sums[0])
            for model, weight in enumerate(self._weights):
                sums.add_(self._sums[model], alpha=weight)
            total.add_(sums.sum(0), alpha=LN2 / 2)
        return total

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the chunk to the denominators."""
        if self._sums is None:
            self._sums = [own.new_full((2, len(own)), -torch.inf) for own in self._own]
        for tile in logit_tiles(self.models, chosen, with_bias=False):
            add_exponentials(self._sums[tile.model][tile.side, tile.rows], tile.logits)

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen: the softmax loss of the whole super-batch.

        An example stands in its own denominator there, as in training.
        """
        self.condition_on(self.models)


class ExactSoftmaxScores:
    """What the candidate adds to the summed softmax loss of the batch chosen so far, exactly.

    Its own loss within the grown batch, and what it adds to the losses of those chosen: with
    Z_j the log-sum-exp of image j over the chosen texts, softplus(x_jk - Z_j); averaged with the
    other direction. The second part changes as a whole with every chunk, so that the cost grows
    with the square of the batch size. With none chosen every score is 0: one example has no loss.
    """

    def __init__(self, models: Sequence[Embeddings], weights: Sequence[float]) -> None:
        self.models = models
        self._weights = weights
        self._own = [own_logits(model, with_bias=False) / LN2 for model in models]
        self._sums = [own.new_full((2, len(own)), -torch.inf) for own in self._own]
        self._added = [torch.zeros_like(own) for own in self._own]
        self._chosen: Sequence[Embeddings] = []

    def scores(self) -> Tensor:
        """Returns the scores that the running sums amount to: `[B]`."""
        total = torch.zeros_like(self._own[0])
        for model, weight in enumerate(self._weights):
            own = self._own[model]
            own_losses = (torch.logaddexp2(self._sums[model], own) - own).sum(0) * LN2
            total.add_(own_losses + self._added[model], alpha=weight / 2)
        return total

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the chunk to the denominators, and recomputes what depends on all of the batch."""
        self._chosen = _joined(self._chosen, chosen)
        for tile in logit_tiles(self.models, chosen, with_bias=False):
            add_exponentials(self._sums[tile.model][tile.side, tile.rows], tile.logits)
        within = [own.new_full((2, len(self._chosen[0].image)), -torch.inf) for own in self._own]
        for tile in logit_tiles(self._chosen, self._chosen, with_bias=False):
            add_exponentials(within[tile.model][tile.side, tile.rows], tile.logits)
        for added in self._added:
            added.zero_()
        for tile in logit_tiles(self.models, self._chosen, with_bias=False):
            # The candidate's text (side 1) stands in the sums of the chosen images (side 0).
            tile.logits.sub_(within[tile.model][1 - tile.side, tile.columns])
            self._added[tile.model][tile.rows] += negative_loss_sums(tile.logits, tile.scratch)


StreamingScores = SigmoidScores | OwnSigmoidScores | SoftmaxScores
"""Those that can also be conditioned on the whole super-batch."""


def streaming_scores(
    learner: Embeddings | None, reference: Embeddings | None, *, score: ScoreFunction, loss: str
) -> StreamingScores:
    """Returns the scores with nothing chosen yet.

    Args:
      learner: float32, or None where the score gives it no weight.
      reference: likewise.
      score: a `WeightedScore` or, with the sigmoid loss only, any function of two tiles.
      loss: "sigmoid" or "softmax".
    """
    if not isinstance(score, WeightedScore):
        assert learner is not None and reference is not None and loss == "sigmoid"
        return OwnSigmoidScores((learner, reference), score)
    models, weights = weighted_models(learner, reference, score)
    kind = SigmoidScores if loss == "sigmoid" else SoftmaxScores
    return kind(models, weights)


def weighted_models(
    learner: Embeddings | None, reference: Embeddings | None, score: WeightedScore
) -> tuple[list[Embeddings], list[float]]:
    """Returns the models that count and their weights: no product is made for one of weight 0."""
    both = ((learner, score.learner_weight), (reference, score.reference_weight))
    counted = [(model, weight) for model, weight in both if model is not None and weight != 0]
    return [model for model, _ in counted], [weight for _, weight in counted]


def take(models: Sequence[Embeddings], indices: Tensor) -> list[Embeddings]:
    """Returns the embeddings of some candidates under each model."""
    return [
        replace(m, image=m.image.index_select(0, indices), text=m.text.index_select(0, indices))
        for m in models
    ]


def _joined(first: Sequence[Embeddings], second: Sequence[Embeddings]) -> Sequence[Embeddings]:
    """Returns the embeddings of both, model by model; the first may be empty."""
    if not first:
        return second
    return [
        replace(a, image=torch.cat((a.image, b.image)), text=torch.cat((a.text, b.text)))
        for a, b in zip(first, second, strict=True)
    ]
