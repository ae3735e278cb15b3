"""Scores of all candidates given the chunks drawn so far: one running vector, no `[B, B]`.

Each class holds what must survive from chunk to chunk and adds the pairs that a new chunk forms
with every candidate; those made to forget can let go of the oldest chunk again. Scores of
candidates that are drawn mean nothing. A chunk is handed over as embeddings, so that the candidates
may be a part of the super-batch only.

B: candidates, C: examples of a chunk. `models` are the learner and the reference, or the one of
them that counts, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def forget(self) -> None:
        """Lets go of the chunk that was taken note of first. For those made with `forgets`."""


class Window:
    """All parts that were added and not yet forgotten, joined; the oldest is forgotten first.

    Nothing is ever subtracted: that would lose digits, and in a log-sum-exp all of them. Instead
    the older parts are kept joined from behind, so that each is joined twice at most.
    """

    def __init__(
        self, nothing: Tensor, join: Callable[[Tensor, Tensor], Tensor], *, forgets: bool
    ) -> None:
        """`nothing` joined to a part leaves the part. Without `forgets` no part is kept."""
        self._nothing = nothing
        self._join = join
        self._forgets = forgets
        self._joined: list[Tensor] = []  # of the older: the last is all of them, the first one part
        self._parts: list[Tensor] = []  # the younger
        self._young = nothing  # the younger, joined
        self.num_parts = 0

    def add(self, part: Tensor) -> None:
        """Takes the part in; it may not be modified afterwards."""
        self._young = self._join(self._young, part)
        self.num_parts += 1
        if self._forgets:
            self._parts.append(part)

    def forget(self) -> None:
        """Leaves the oldest part out from now on."""
        assert self._forgets and self.num_parts
        if not self._joined:
            behind = self._nothing
            while self._parts:
                behind = self._join(self._parts.pop(), behind)
                self._joined.append(behind)
            self._young = self._nothing
        self._joined.pop()
        self.num_parts -= 1

    def joined(self) -> Tensor:
        """Returns all parts joined. Not to be modified."""
        return self._join(self._joined[-1], self._young) if self._joined else self._young


class SigmoidScores:
    """Exact: S_kk + sum over chosen j of (S_kj + S_jk), for weighted sums of sigmoid losses."""

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        self.models = models
        self._weights = weights
        self._own = torch.zeros_like(models[0].image[:, 0])
        for model, weight in zip(models, weights, strict=True):
            self._own.add_(softplus(-own_logits(model, with_bias=True)), alpha=weight)
        self._given = Window(torch.zeros_like(self._own), torch.add, forgets=forgets)

    def scores(self) -> Tensor:
        """Returns the scores that the running sums amount to: `[B]`."""
        return self._own + self._given.joined()

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the scores of the candidates' pairs with the chunk."""
        self._given.add(self._scores_with(chosen))

    def forget(self) -> None:
        """Leaves the pairs with the oldest chunk out again."""
        self._given.forget()

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen, an example and itself excepted."""
        scores = self._scores_with(self.models)
        for model, weight in zip(self.models, self._weights, strict=True):
            itself = softplus(own_logits(model, with_bias=True))
            scores.sub_(itself, alpha=2 * weight)
        self._given.add(scores)

    def _scores_with(self, chosen: Sequence[Embeddings]) -> Tensor:
        """Returns the summed scores of each candidate's pairs with these, none taken to match."""
        # All pairs are taken as negatives. That is wrong for an example and itself only, and so
        # for chosen candidates only: no mask is needed.
        scores = torch.zeros_like(self._own)
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses = negative_loss_sums(tile.logits, tile.scratch)
            scores[tile.rows].add_(losses, alpha=self._weights[tile.model])
        return scores


class OwnSigmoidScores:
    """As `SigmoidScores`, for any function of the learner's and the reference's pair losses."""

    def __init__(
        self, models: Sequence[Embeddings], score: ScoreFunction, *, forgets: bool = False
    ) -> None:
        self.models = models
        self._score = score
        learner, reference = (-own_logits(model, with_bias=True) for model in models)
        self._own = self._score_own(learner, reference).float().clone()
        self._given = Window(torch.zeros_like(self._own), torch.add, forgets=forgets)

    def scores(self) -> Tensor:
        """Returns the scores that the running sums amount to: `[B]`."""
        return self._own + self._given.joined()

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the scores of the candidates' pairs with the chunk."""
        self._given.add(self._scores_with(chosen))

    def forget(self) -> None:
        """Leaves the pairs with the oldest chunk out again."""
        self._given.forget()

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen, an example and itself excepted."""
        learner, reference = (own_logits(model, with_bias=True) for model in self.models)
        itself = self._score_own(learner, reference)
        self._given.add(self._scores_with(self.models) - 2 * itself)

    def _scores_with(self, chosen: Sequence[Embeddings]) -> Tensor:
        """Returns the summed scores of each candidate's pairs with these, none taken to match."""
        scores = torch.zeros_like(self._own)
        losses: list[Tensor] = []
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses.append(negative_losses(tile.logits))
            if len(losses) == 2:  # the learner's and the reference's, of the same pairs
                scores[tile.rows] += score_tile(self._score, *losses).sum(1)
                losses.clear()
        return scores

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

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        self.models = models
        self._weights = weights
        self._own = [own_logits(model, with_bias=False) for model in models]
        self._given = Window(_no_sums(models), _added_sums, forgets=forgets)

    def scores(self) -> Tensor:
        """Returns the scores that the running sums amount to: `[B]`."""
        total = torch.zeros_like(self._own[0])
        for model, weight in enumerate(self._weights):
            total.sub_(self._own[model], alpha=weight)
        # Where two models agree the sums cancel exactly, as long as the difference comes first.
        if self._given.num_parts:
            given = self._given.joined()
            sums = torch.zeros_like(given[0])
            for model, weight in enumerate(self._weights):
                sums.add_(given[model], alpha=weight)
            total.add_(sums.sum(0), alpha=LN2 / 2)
        return total

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the chunk to the denominators."""
        self._given.add(_log_sums(self.models, chosen))

    def forget(self) -> None:
        """Leaves the oldest chunk out of the denominators again."""
        self._given.forget()

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

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        self.models = models
        self._weights = weights
        self._own = [own_logits(model, with_bias=False) / LN2 for model in models]
        self._given = Window(_no_sums(models), _added_sums, forgets=forgets)
        self._chosen: list[Sequence[Embeddings]] = []

    def scores(self) -> Tensor:
        """Returns the scores that all chunks amount to: `[B]`. Recomputes what depends on all."""
        total, given, added = torch.zeros_like(self._own[0]), self._given.joined(), self._added()
        for model, weight in enumerate(self._weights):
            own = self._own[model]
            own_losses = (torch.logaddexp2(given[model], own) - own).sum(0) * LN2
            total.add_(own_losses + added[model], alpha=weight / 2)
        return total

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the chunk to the denominators and to the batch."""
        self._given.add(_log_sums(self.models, chosen))
        self._chosen.append(chosen)

    def forget(self) -> None:
        """Takes the oldest chunk out of the batch again."""
        self._given.forget()
        del self._chosen[0]

    def _added(self) -> Tensor:
        """Returns what each candidate adds to the losses of those chosen, by model: `[M, B]`."""
        added = torch.stack([torch.zeros_like(own) for own in self._own])
        if not self._chosen:
            return added
        batch = [_joined(parts) for parts in zip(*self._chosen, strict=True)]
        within = _log_sums(batch, batch)
        for tile in logit_tiles(self.models, batch, with_bias=False):
            # The candidate's text (side 1) stands in the sums of the chosen images (side 0).
            tile.logits.sub_(within[tile.model, 1 - tile.side, tile.columns])
            added[tile.model][tile.rows] += negative_loss_sums(tile.logits, tile.scratch)
        return added


StreamingScores = SigmoidScores | OwnSigmoidScores | SoftmaxScores
"""Those that can also be conditioned on the whole super-batch."""


def streaming_scores(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    score: ScoreFunction,
    loss: str,
    forgets: bool = False,
) -> StreamingScores:
    """Returns the scores with nothing chosen yet.

    Args:
      learner: float32, or None where the score gives it no weight.
      reference: likewise.
      score: a `WeightedScore` or, with the sigmoid loss only, any function of two tiles.
      loss: "sigmoid" or "softmax".
      forgets: whether chunks will be forgotten, so that what each of them adds must be kept.
    """
    if not isinstance(score, WeightedScore):
        assert learner is not None and reference is not None and loss == "sigmoid"
        return OwnSigmoidScores((learner, reference), score, forgets=forgets)
    models, weights = weighted_models(learner, reference, score)
    kind = SigmoidScores if loss == "sigmoid" else SoftmaxScores
    return kind(models, weights, forgets=forgets)


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


def _joined(parts: Sequence[Embeddings]) -> Embeddings:
    """Returns the embeddings of several chunks by one model, one after the other."""
    return replace(
        parts[0],
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
    )


def _no_sums(models: Sequence[Embeddings]) -> Tensor:
    """Returns the logarithms of empty sums: `[M, 2, B]`, for M models, their images and texts."""
    image = models[0].image
    return image.new_full((len(models), 2, len(image)), -torch.inf)


def _added_sums(first: Tensor, second: Tensor) -> Tensor:
    """Returns the logarithms of the sums of both: `[M, 2, B]`."""
    # Model by model: vector instructions round the same numbers otherwise in the rest of a row, and
    # the sums of equal models are to stay equal.
    return torch.stack([torch.logaddexp2(*pair) for pair in zip(first, second, strict=True)])


def _log_sums(models: Sequence[Embeddings], chosen: Sequence[Embeddings]) -> Tensor:
    """Returns log2 of each candidate's sum of e^logit over the chosen: `[M, 2, B]`."""
    sums = _no_sums(models)
    for tile in logit_tiles(models, chosen, with_bias=False):
        add_exponentials(sums[tile.model, tile.side, tile.rows], tile.logits)
    return sums
