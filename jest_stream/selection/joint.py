"""Joint example selection: chunks of a sub-batch, each drawn given the chunks before it.

Algorithm 1 of Evans et al. 2024 (https://arxiv.org/abs/2406.17711) without its `[B, B]` matrix.
The score of an example given those chosen is a sum over pairs, so that one running vector of B
values is enough: a new chunk adds to it what its pairs with every candidate say. For two models
that takes 8 B b D floating-point operations in matrix products instead of 4 B^2 D, and memory for
one tile. `tests/naive.py` transcribes the paper's listing, as the oracle.

What is drawn first is drawn while hardly any pair counts, and steers all that follows. Sweeps mend
that: one chunk after the other is put back and drawn again, given all others. This is a Gibbs
sampler with chunks for blocks, and costs one more selection per sweep. With one example per chunk
it is the paper's brute-force sampler itself, whose sub-batches come up in proportion to
e^(sum of the scores of their pairs).

Pure functions: no state, no process groups, no global randomness. On a GPU nothing waits for the
device, and no shape depends on data, so that a call can be enqueued.

B: super-batch size, b: batch size, D: dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jest_stream.config import ScoreFunction, as_integer
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
    num_sweeps: int = 0,
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
      learner: `[B, D]` embeddings by the model being trained, unit norm; None if not needed.
      reference: the same examples by the reference model, whose D may differ. None likewise.
      batch_size: b, how many to keep.
      num_chunks: sequential draws; a remainder goes to the first. 1 is independent selection.
      num_sweeps: how often all chunks are then drawn again, one at a time given all others, uniform
        picks excepted. 0 is the paper's algorithm. Each sweep costs one more selection.
      score: what is maximised: "learnability", "easy_reference" (needs no learner), "hard_learner"
        (no reference), a `WeightedScore`, or with the sigmoid loss any function of two tiles of
        pair losses in nats that treats each pair alone.
      loss: "sigmoid" scores an example by S_kk + sum over chosen j of (S_kj + S_jk), exactly.
        "softmax" by its own loss against the chosen, itself not among them; at first by its logit.
      exact_marginal: for the softmax loss, scores by what an example adds to the loss of the whole
        batch. Costs b^2 B: for small batches and as an oracle. The sigmoid is exact anyway.
      gain, effective_support, terms, uniform_fraction, groups: how it is drawn; see `DrawRule`.
      generator: randomness, one number of which is consumed. None: the operating system's.

    Raises:
      ConfigError: if sizes, shapes, devices or the score do not fit.
      NonFiniteError: on a CPU, if values are not finite; else see `Selection.is_finite`.
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
        num_sweeps=num_sweeps,
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
    num_sweeps: int = 0,
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
    batch_size, num_chunks = check_sizes(candidates.num_examples, batch_size, num_chunks)
    num_sweeps = as_integer("num_sweeps", num_sweeps, 0)
    if num_chunks == 1:  # there are no others to be given
        num_sweeps = 0
    conditional: ConditionalScores
    if exact_marginal and loss == "softmax":
        assert isinstance(candidates.score, WeightedScore)
        conditional = ExactSoftmaxScores(
            *weighted_models(candidates.learner, candidates.reference, candidates.score),
            forgets=num_sweeps > 0,
        )
    else:
        conditional = streaming_scores(
            candidates.learner,
            candidates.reference,
            score=candidates.score,
            loss=loss,
            forgets=num_sweeps > 0,
        )
    sizes = chunk_sizes(batch_size, num_chunks)
    return draw(
        conditional,
        candidates,
        sizes=sizes,
        rule=rule,
        num_sweeps=num_sweeps,
        key=key,
        step=step,
    )
