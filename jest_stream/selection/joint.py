"""Joint example selection: chunks of a sub-batch, each drawn given the chunks before it.

Algorithm 1 of Evans et al. 2024 (https://arxiv.org/abs/2406.17711) without its `[B, B]` matrix.
The score of an example given those chosen is a sum over pairs, so that one running vector of B
values is enough: a new chunk adds to it what its pairs with every candidate say. For two models
that takes 8 B b D floating-point operations in matrix products instead of 4 B^2 D, and memory for
one tile. `tests/naive.py` transcribes the paper's listing, as the oracle.

Pure functions: no state, no process groups, no global randomness. On a GPU nothing waits for the
device, and no shape depends on data, so that a call can be enqueued.

B: super-batch size, b: batch size, D: dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jest_stream.config import ScoreFunction
from jest_stream.selection.checks import check_candidates, check_sizes
from jest_stream.selection.conditional import (
    ConditionalScores,
    ExactSoftmaxScores,
    streaming_scores,
    weighted_models,
)
from jest_stream.selection.drawing import PLAIN, DrawRule, draw
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import chunk_sizes, draw_key
from jest_stream.selection.scores import WeightedScore
from jest_stream.types import Embeddings, Selection


def select_jointly(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    batch_size: int,
    num_chunks: int = 16,
    score: str | ScoreFunction = "learnability",
    loss: str = "sigmoid",
    exact_marginal: bool = False,
    gain: float = 1.0,
    effective_support: float | None = None,
    terms: Tensor | None = None,
    uniform_fraction: float = 0.0,
    groups: Groups | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the indices of a jointly learnable sub-batch, in draw order: `[b]` int64, distinct.

    Args:
      learner: `[B, D]` embeddings by the model being trained, unit norm, in any floating type;
        computed with in float32. None if the score needs none.
      reference: the same examples by the reference model, whose D may differ. None likewise.
      batch_size: b, how many to keep.
      num_chunks: sequential draws; a remainder goes to the first. 1 is independent selection.
      score: what is maximised: "learnability", "easy_reference" (needs no learner), "hard_learner"
        (no reference), a `WeightedScore`, or with the sigmoid loss any function of two tiles of
        pair losses in nats that treats each pair alone.
      loss: "sigmoid" scores an example by S_kk + sum over chosen j of (S_kj + S_jk), exactly.
        "softmax" scores it by its own loss against the chosen texts and images.
      exact_marginal: for the softmax loss, scores by what an example adds to the loss of the whole
        batch. Costs b^2 B: for small batches and as an oracle. The sigmoid is exact anyway.
      gain, effective_support, terms, uniform_fraction, groups: how it is drawn; see `DrawRule`.
      generator: randomness, one number of which is consumed. None: fresh entropy from the
        operating system. The global random state is never touched.

    Raises:
      ConfigError: if sizes, shapes, devices or the score do not fit.
      NonFiniteError: on a CPU, if embeddings or scores are not finite. On a GPU the `is_finite` of
        `joint_selection` tells without waiting.
    """
    rule = DrawRule(
        gain=gain,
        effective_support=effective_support,
        terms=terms,
        uniform_fraction=uniform_fraction,
        groups=groups,
    )
    return joint_selection(
        learner,
        reference,
        batch_size=batch_size,
        num_chunks=num_chunks,
        score=score,
        loss=loss,
        exact_marginal=exact_marginal,
        rule=rule,
        key=draw_key(generator),
        step=0,
    ).indices


@torch.no_grad()
def joint_selection(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    batch_size: int,
    num_chunks: int = 16,
    score: str | ScoreFunction = "learnability",
    loss: str = "sigmoid",
    exact_marginal: bool = False,
    rule: DrawRule = PLAIN,
    key: int,
    step: int,
) -> Selection:
    """Returns a jointly learnable sub-batch with what metrics want to know of the draw.

    Args:
      rule: how examples are drawn by their scores.
      key: names the noise of the run; with `step` it names that of this draw.
      step: which sub-batch of the run.

    The other arguments and the errors are those of `select_jointly`.
    """
    candidates = check_candidates(learner, reference, score=score, loss=loss)
    check_sizes(candidates.num_examples, batch_size, num_chunks)
    conditional: ConditionalScores
    if exact_marginal and loss == "softmax":
        assert isinstance(candidates.score, WeightedScore)
        conditional = ExactSoftmaxScores(
            *weighted_models(candidates.learner, candidates.reference, candidates.score)
        )
    else:
        conditional = streaming_scores(
            candidates.learner, candidates.reference, score=candidates.score, loss=loss
        )
    sizes = chunk_sizes(batch_size, num_chunks)
    return draw(conditional, candidates, sizes=sizes, rule=rule, key=key, step=step)
