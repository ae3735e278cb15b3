"""Selects by the baselines: each example scored alone, or no scoring at all.

Embeddings, or a number of examples, go in; indices or a `Selection` come out. Both baselines draw
with the same kind of noise as joint selection. B: super-batch size, b: batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jest_stream.config import ScoreFunction, as_integer
from jest_stream.errors import ConfigError
from jest_stream.selection.checks import check_batch_size, check_candidates
from jest_stream.selection.conditional import conditional_scores
from jest_stream.selection.drawing import PLAIN, DrawRule, Urn, draw
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import draw_key, gumbel_noise
from jest_stream.types import Embeddings, Selection


def select_independently(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    batch_size: int,
    num_chunks: int = 1,
    num_sweeps: int = 0,
    score: str | ScoreFunction = "learnability",
    loss: str = "sigmoid",
    negatives: str = "none",
    gain: float = 1.0,
    effective_support: float | None = None,
    terms: Tensor | None = None,
    uniform_fraction: float = 0.0,
    groups: Groups | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the indices of examples drawn by their own scores: `[b]` int64, in draw order.

    "Independent" has two meanings, and both are offered:

    - `negatives="none"`: the score of an example's own pair. Joint selection with one chunk.
    - `negatives="super_batch"`: its score given all other candidates, as if the super-batch were
      trained on: sigmoid, S_kk + sum over j != k of (S_kj + S_jk); softmax, the loss of each
      example within the super-batch. Costs B^2 D, still without a `[B, B]` matrix.

    Args:
      num_chunks, num_sweeps: checked, then unused: without conditioning the number of draws changes
        nothing. Taken, so that one call fits this function and `select_jointly`.
      negatives: one of the two meanings.

    The other arguments and the errors are those of `select_jointly`.
    """
    as_integer("num_chunks", num_chunks, 1)
    as_integer("num_sweeps", num_sweeps, 0)
    return independent_selection(
        learner,
        reference,
        batch_size=batch_size,
        score=score,
        loss=loss,
        negatives=negatives,
        rule=DrawRule(gain, effective_support, terms, uniform_fraction, groups),
        key=draw_key(generator),
        step=0,
    ).indices


@torch.no_grad()
def independent_selection(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    batch_size: int,
    score: str | ScoreFunction = "learnability",
    loss: str = "sigmoid",
    negatives: str = "none",
    rule: DrawRule = PLAIN,
    key: int,
    step: int,
) -> Selection:
    """Returns the `Selection` of `select_independently`; rule, key, step: `joint_selection`."""
    if negatives not in ("none", "super_batch"):
        raise ConfigError(f"negatives must be 'none' or 'super_batch', got {negatives!r}")
    candidates = check_candidates(learner, reference, score=score, loss=loss)
    batch_size = check_batch_size(batch_size, candidates.num_examples)
    scores = conditional_scores(candidates)
    if negatives == "super_batch":
        scores.condition_on_all()
    return draw(scores, candidates, sizes=[batch_size], rule=rule, key=key, step=step)


def select_uniformly(
    num_examples: int, *, batch_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """Returns the indices of examples drawn without scoring: `[b]` int64, distinct.

    Args:
      num_examples: B, candidates to choose from.
      batch_size: b, examples to keep.
      generator: randomness, one number of which is consumed; the indices are on its device. None:
        fresh entropy from the operating system, indices on the CPU.

    Raises:
      ConfigError: unless 1 <= batch_size <= num_examples.
    """
    device = torch.device("cpu") if generator is None else generator.device
    selection = uniform_selection(
        num_examples, batch_size=batch_size, key=draw_key(generator), step=0, device=device
    )
    return selection.indices


def uniform_selection(
    num_examples: int,
    *,
    batch_size: int,
    groups: Groups | None = None,
    key: int,
    step: int,
    device: torch.device | None = None,
) -> Selection:
    """Returns the `Selection` of `select_uniformly`, its scores NaN.

    Args:
      groups: bounds on how many of a group are drawn; uniform within.
      key, step: as `joint_selection`.
      device: where the indices are wanted; default the CPU.
    """
    batch_size = check_batch_size(batch_size, num_examples)
    urn = Urn(num_examples, [batch_size], groups, device=device)
    # Equal scores leave the order to the noise, so this is a draw like any other, quotas included.
    noise = gumbel_noise(key, step, 0, urn.positions)
    urn.draw(0, torch.zeros_like(noise), gain=1.0, noise=noise)
    no_score = torch.full((), torch.nan, device=device)
    return urn.selection(
        effective_support=torch.full((1,), float(num_examples), device=device),
        selected_score=no_score,
        candidate_score=no_score,
        is_finite=torch.ones((), dtype=torch.bool, device=device),
    )
