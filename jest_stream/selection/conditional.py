"""Scores all candidates given the chunks drawn so far: one running vector, no `[B, B]`.

Each class holds the sums that must survive from chunk to chunk and adds the pairs that a new chunk
forms with every candidate; those made to forget can let go of the oldest chunk again. The scores of
drawn candidates are meaningless. A chunk is handed over as embeddings, because the candidates may
be a part of the super-batch only.

Notation, as in the paper but for the sign of the bias: x_ij = t u_i.v_j + bias is the logit of
image i and text j, L_ij its sigmoid loss (Eq. 2): softplus(x_ij), on the diagonal softplus(-x_ii).
S is the learner's L minus the reference's, or another function of the two.

B: candidates, C: examples of a chunk, M: models that count (the learner, the reference, or both),
in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from jest_stream.config import ScoreFunction
from jest_stream.selection.checks import Candidates
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


class Window:
    """Joins all parts that were added and not yet forgotten; the oldest is forgotten first.

    Nothing is ever subtracted: that would lose digits, and in a log-sum-exp all of them. Instead
    this is a queue made of two stacks, so each part is joined twice at most. Parts a, b, c, d:

        added                       young = a+b+c+d                  old = []
        forget: the stack turns     young = nothing                  old = [d, c+d, b+c+d]
        e is added                  young = e                        old = [d, c+d, b+c+d]
        joined                      (b+c+d) + e
    """

    def __init__(
        self, nothing: Tensor, join: Callable[[Tensor, Tensor], Tensor], *, forgets: bool
    ) -> None:
        """`nothing` joined to a part leaves the part. Without `forgets` no part is kept."""
        self._nothing = nothing
        self._join = join
        self._forgets = forgets
        self._old: list[Tensor] = []  # joined from the newest on: the last entry is all of them
        self._parts: list[Tensor] = []  # the young ones, one by one
        self._young = nothing  # the young ones, joined
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
        if not self._old:
            total = self._nothing
            while self._parts:
                total = self._join(self._parts.pop(), total)
                self._old.append(total)
            self._young = self._nothing
        self._old.pop()
        self.num_parts -= 1

    def joined(self) -> Tensor:
        """Returns all parts joined. Not to be modified."""
        return self._join(self._old[-1], self._young) if self._old else self._young


class ConditionalScores(ABC):
    """Scores of the candidates, each given the examples chosen so far."""

    def __init__(self, models: Sequence[Embeddings], given: Window) -> None:
        self.models = models
        self._given = given

    @abstractmethod
    def scores(self) -> Tensor:
        """Returns the score of every candidate: `[B]` float32, in nats. Not to be modified."""

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Takes note of a chunk that was chosen: for each of `models`, its `[C, D]` embeddings."""
        self._given.add(self._part(chosen))

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen."""
        self.condition_on(self.models)

    def forget(self) -> None:
        """Lets go of the chunk noted first. For those made with `forgets`."""
        self._given.forget()

    @abstractmethod
    def _part(self, chosen: Sequence[Embeddings]) -> Tensor:
        """Returns the part of the running sums that a chunk contributes."""


class _PairSums(ConditionalScores):
    """Exact for the sigmoid loss: S_kk + sum over chosen j of (S_kj + S_jk).

    The batch's score is the sum of all its S_ij; candidate k adds just these terms to it.
    """

    def __init__(self, models: Sequence[Embeddings], *, forgets: bool) -> None:
        zeros = torch.zeros_like(models[0].image[:, 0])
        super().__init__(models, Window(zeros, torch.add, forgets=forgets))
        self._own = zeros.clone()
        self._add_own_pairs(self._own, 1, are_matches=True)

    def scores(self) -> Tensor:
        """Returns the scores of the own pairs and of those with the chosen: `[B]`."""
        return self._own + self._given.joined()

    def condition_on_all(self) -> None:
        """Takes all candidates as chosen, an example and itself excepted."""
        # `_part` counts the pair of an example with itself twice, as a row and as a column.
        scores = self._part(self.models)
        self._add_own_pairs(scores, -2, are_matches=False)
        self._given.add(scores)

    @abstractmethod
    def _part(self, chosen: Sequence[Embeddings]) -> Tensor:
        """Returns for each candidate the summed scores of its pairs with the chosen: `[B]`.

        All pairs are taken as negatives. That is wrong for an example and itself only, hence for
        chosen candidates only, whose scores are not used: no mask is needed.
        """

    @abstractmethod
    def _add_own_pairs(self, scores: Tensor, factor: int, *, are_matches: bool) -> None:
        """Adds to each score that of the example's own pair: S_kk if it is taken to match."""


class SigmoidScores(_PairSums):
    """Pair sums of a weighted sum of sigmoid losses: no tile of scores is ever made."""

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        self._weights = weights
        super().__init__(models, forgets=forgets)

    def _part(self, chosen: Sequence[Embeddings]) -> Tensor:
        scores = torch.zeros_like(self._own)
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses = negative_loss_sums(tile.logits, tile.scratch)
            scores[tile.rows].add_(losses, alpha=self._weights[tile.model])
        return scores

    def _add_own_pairs(self, scores: Tensor, factor: int, *, are_matches: bool) -> None:
        for model, weight in zip(self.models, self._weights, strict=True):
            logits = own_logits(model, with_bias=True)
            scores.add_(softplus(-logits if are_matches else logits), alpha=factor * weight)


class OwnSigmoidScores(_PairSums):
    """Pair sums of any function of the learner's and the reference's sigmoid losses."""

    def __init__(
        self, models: Sequence[Embeddings], score: ScoreFunction, *, forgets: bool = False
    ) -> None:
        self._score = score
        super().__init__(models, forgets=forgets)

    def _part(self, chosen: Sequence[Embeddings]) -> Tensor:
        scores = torch.zeros_like(self._own)
        losses: list[Tensor] = []
        for tile in logit_tiles(self.models, chosen, with_bias=True):
            losses.append(negative_losses(tile.logits))
            if len(losses) == 2:  # the learner's and the reference's, of the same pairs
                scores[tile.rows] += score_tile(self._score, *losses).sum(1)
                losses.clear()
        return scores

    def _add_own_pairs(self, scores: Tensor, factor: int, *, are_matches: bool) -> None:
        logits = [own_logits(model, with_bias=True) for model in self.models]
        # The user's function takes tiles, here of one column.
        learner, reference = (softplus(-x if are_matches else x)[:, None] for x in logits)
        scores.add_(score_tile(self._score, learner, reference)[:, 0], alpha=factor)


class _LogSums(ConditionalScores):
    """Holds log2 of each candidate's sums of e^logit over the chosen, for softmax losses."""

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        super().__init__(models, Window(_no_sums(models), _added_sums, forgets=forgets))
        self._weights = weights
        self._own = [own_logits(model, with_bias=False) for model in models]

    def _part(self, chosen: Sequence[Embeddings]) -> Tensor:
        return _log_sums(self.models, chosen)


class SoftmaxScores(_LogSums):
    """The candidate's own softmax loss (Eq. 1), its denominators running over the chosen examples.

    Of image k: log(sum over chosen j of e^{x_kj}) - x_kk, averaged with the same of its text; the
    candidate itself is not in the sum. With none chosen: -x_kk. The sums are streamed as a
    log-sum-exp, so scores grow with log b only. The loss that the candidate adds to the chosen
    ones is left out: see `ExactSoftmaxScores`.

    Conditioned on all, this is the softmax loss of the whole super-batch: an example then stands in
    its own denominator, as in training.
    """

    def scores(self) -> Tensor:
        """Returns the weighted losses against the chosen: `[B]`."""
        total = torch.zeros_like(self._own[0])
        for model, weight in enumerate(self._weights):
            total.sub_(self._own[model], alpha=weight)
        # 1. None chosen: log 0 = -inf under both models, whose difference would be NaN. The own
        #    logits alone are the score.
        if not self._given.num_parts:
            return total
        # 2. Else the models' sums are subtracted before anything else is added: where two models
        #    agree, they cancel exactly.
        given = self._given.joined()
        sums = torch.zeros_like(given[0])
        for model, weight in enumerate(self._weights):
            sums.add_(given[model], alpha=weight)
        return total.add_(sums.sum(0), alpha=LN2 / 2)


class ExactSoftmaxScores(_LogSums):
    """The candidate's exact addition to the summed softmax loss of the batch chosen so far.

    Its own loss within the grown batch, and its addition to the losses of those chosen: with Z_j
    the log-sum-exp of image j over the chosen texts, the sum over j of softplus(x_jk - Z_j);
    averaged with the other direction. The second part changes as a whole with every chunk: the
    cost grows with the square of the batch size. With none chosen every score is 0: one example
    has no loss.
    """

    def __init__(
        self, models: Sequence[Embeddings], weights: Sequence[float], *, forgets: bool = False
    ) -> None:
        super().__init__(models, weights, forgets=forgets)
        self._chosen: list[Sequence[Embeddings]] = []

    def scores(self) -> Tensor:
        """Returns the scores given all chunks: `[B]`. Recomputes the part that depends on all."""
        total, given, added = torch.zeros_like(self._own[0]), self._given.joined(), self._added()
        for model, weight in enumerate(self._weights):
            own = self._own[model] / LN2
            # log(sum over chosen j of e^{x_kj} + e^{x_kk}) - x_kk, for image and text
            own_losses = (torch.logaddexp2(given[model], own) - own).sum(0) * LN2
            total.add_(own_losses + added[model], alpha=weight / 2)
        return total

    def condition_on(self, chosen: Sequence[Embeddings]) -> None:
        """Adds the chunk to the denominators and to the batch."""
        super().condition_on(chosen)
        self._chosen.append(chosen)

    def forget(self) -> None:
        """Takes the oldest chunk out of the batch again."""
        super().forget()
        del self._chosen[0]

    def _added(self) -> Tensor:
        """Returns each candidate's addition to the losses of those chosen, by model: `[M, B]`."""
        added = torch.stack([torch.zeros_like(own) for own in self._own])
        if not self._chosen:
            return added
        batch = [_concatenated(parts) for parts in zip(*self._chosen, strict=True)]
        within = _log_sums(batch, batch)  # Z_j, in units of ln 2
        for tile in logit_tiles(self.models, batch, with_bias=False):
            # The candidate's text (side 1) stands in the sums of the chosen images (side 0).
            tile.logits.sub_(within[tile.model, 1 - tile.side, tile.columns])
            added[tile.model][tile.rows] += negative_loss_sums(tile.logits, tile.scratch)
        return added


def conditional_scores(
    candidates: Candidates, *, exact_marginal: bool = False, forgets: bool = False
) -> ConditionalScores:
    """Returns the scores with nothing chosen yet.

    Args:
      exact_marginal: of the softmax loss; the sigmoid's is exact anyway.
      forgets: whether chunks will be forgotten, for which the sums of each must be kept.
    """
    learner, reference, score = candidates.learner, candidates.reference, candidates.score
    # 1. A function of the user's needs both models, and the losses of single pairs.
    if not isinstance(score, WeightedScore):
        assert learner is not None and reference is not None and candidates.loss == "sigmoid"
        return OwnSigmoidScores((learner, reference), score, forgets=forgets)
    # 2. In a weighted sum a model of weight 0 is left out: none of its products is made.
    both = ((learner, score.learner_weight), (reference, score.reference_weight))
    counted = [(model, weight) for model, weight in both if model is not None and weight != 0]
    models, weights = [model for model, _ in counted], [weight for _, weight in counted]
    if candidates.loss == "sigmoid":
        return SigmoidScores(models, weights, forgets=forgets)
    kind = ExactSoftmaxScores if exact_marginal else SoftmaxScores
    return kind(models, weights, forgets=forgets)


def take(models: Sequence[Embeddings], indices: Tensor) -> list[Embeddings]:
    """Returns the embeddings of some candidates under each model."""
    return [
        replace(m, image=m.image.index_select(0, indices), text=m.text.index_select(0, indices))
        for m in models
    ]


def _concatenated(parts: Sequence[Embeddings]) -> Embeddings:
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
