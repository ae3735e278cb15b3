"""Selects jointly: chunks of a sub-batch, each drawn given the chunks before it.

Algorithm 1 of Evans et al. 2024 (https://arxiv.org/abs/2406.17711) without its `[B, B]` matrix.
The score of an example given the chosen ones is a sum over pairs, so one running vector of B values
is enough: each new chunk adds the scores of its pairs with every candidate. For two models that
takes 8 B b D floating-point operations in matrix products instead of 4 B^2 D, and memory for one
tile. At the paper's B = 163,840 the two matrices alone would take 215 GB. `tests/naive.py`
transcribes the paper's listing, as the oracle.

The first chunks are drawn while hardly any pair counts, and steer all that follows. Sweeps mend
that: one chunk after the other is put back and drawn again, given all others. This is a Gibbs
sampler with chunks for blocks, and costs one more selection per sweep. With one example per chunk
it is the paper's brute-force sampler itself, whose sub-batches come up in proportion to
e^(sum of the scores of their pairs).

Pure functions: no state, no process groups, no global randomness. On a GPU nothing waits for the
device, and no shape depends on data: the host can enqueue a whole call.

B: super-batch size, b: batch size, D: dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jest_stream.config import ScoreFunction, as_integer
from jest_stream.selection.checks import check_batch_size, check_candidates
from jest_stream.selection.conditional import conditional_scores
from jest_stream.selection.drawing import PLAIN, DrawRule, draw
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import chunk_sizes, draw_key
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
      batch_size: b, examples to keep.
      num_chunks: sequential draws, clamped to one per example of the batch; a remainder goes to
        the first ones. 16 is the paper's default, 1 is independent selection.
      num_sweeps: times that all chunks are then drawn again, one at a time given all others, but
        for uniform picks. 0 is the paper's algorithm. Each sweep costs one more selection.
      score: the quantity to maximise: "learnability", "easy_reference" (needs no learner),
        "hard_learner" (no reference), a `WeightedScore`, or with the sigmoid loss any function of
        two tiles of pair losses in nats that treats each pair alone.
      loss: "sigmoid" scores an example by S_kk + sum over chosen j of (S_kj + S_jk), exactly.
        "softmax" scores it by its own loss with the chosen as negatives; in the first chunk by its
        logit.
      exact_marginal: for the softmax loss, scores by the loss that an example adds to the whole
        batch. Costs b^2 B: for small batches and as an oracle. The sigmoid is exact anyway.
      gain, effective_support, terms, uniform_fraction, groups: how to draw; see `DrawRule`.
      generator: randomness, one number of which is consumed. None: the operating system's.

    Raises:
      ConfigError: if sizes, shapes, devices or the score do not fit.
      NonFiniteError: on a CPU, if values are not finite; else see `Selection.is_finite`.
    """
    return joint_selection(
        learner,
        reference,
        batch_size=batch_size,
        num_chunks=num_chunks,
        num_sweeps=num_sweeps,
        score=score,
        loss=loss,
        exact_marginal=exact_marginal,
        rule=DrawRule(gain, effective_support, terms, uniform_fraction, groups),
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
    """Returns the `Selection` of a jointly learnable sub-batch.

    Args:
      rule: how examples are drawn by their scores.
      key: names the noise of the run; with `step` it names that of this draw.
      step: number of the sub-batch in the run.

    The other arguments and the errors are those of `select_jointly`.
    """
    candidates = check_candidates(learner, reference, score=score, loss=loss)
    batch_size = check_batch_size(batch_size, candidates.num_examples)
    sizes = chunk_sizes(batch_size, as_integer("num_chunks", num_chunks, 1))
    num_sweeps = as_integer("num_sweeps", num_sweeps, 0)
    # A sweep draws each chunk given the others. A single chunk has none: it would only be drawn
    # again from the same distribution.
    if len(sizes) == 1:
        num_sweeps = 0
    conditional = conditional_scores(
        candidates, exact_marginal=exact_marginal, forgets=num_sweeps > 0
    )
    return draw(
        conditional, candidates, sizes=sizes, rule=rule, num_sweeps=num_sweeps, key=key, step=step
    )
