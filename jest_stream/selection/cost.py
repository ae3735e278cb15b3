"""Counts the FLOPs of a choice: the products of embeddings. A multiply-add counts as 2."""

from __future__ import annotations

from collections.abc import Iterable

from jest_stream.config import SelectionConfig, TargetSimilarity
from jest_stream.selection.sampling import chunk_sizes
from jest_stream.selection.scores import needs
from jest_stream.types import Embeddings


def choice_flops(
    config: SelectionConfig,
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    batch_size: int,
) -> int:
    """Returns the FLOPs of choosing a sub-batch by the rule of `config`.

    Args:
      config: the rule, whose method is not "uniform".
      learner: of the candidates; None where the score does not need it.
      reference: likewise.
      batch_size: b.
    """
    both = zip((learner, reference), needs(config.score), strict=True)
    counted = [model for model, counts in both if counts and model is not None]
    flops = 0
    if config.method == "joint":
        num_given = num_conditioned_on(batch_size, config.num_chunks, config.num_sweeps)
        dimensions = [model.image.shape[1] for model in counted]
        flops += selection_flops(len(counted[0].image), num_given, dimensions)
    for term in config.terms:
        if isinstance(term, TargetSimilarity):
            assert reference is not None
            flops += 2 * len(reference.image) * term.targets.numel()
    return flops


def selection_flops(num_candidates: int, num_given: int, dimensions: Iterable[int]) -> int:
    """Returns the FLOPs of conditioning all candidates on examples that were drawn.

    Args:
      num_candidates: B.
      num_given: drawn examples that others were conditioned on, see `num_conditioned_on`.
      dimensions: embedding dimension of each model that scores.
    """
    # Each meets all candidates twice, as image and as text: two products of 2 D FLOPs per pair.
    return 4 * num_candidates * num_given * sum(dimensions)


def num_conditioned_on(batch_size: int, num_chunks: int, num_sweeps: int) -> int:
    """Returns on how many drawn examples the candidates are conditioned; again in each sweep.

    The last chunk that is drawn conditions nothing: 8 examples in chunks of 2 make 6, with one
    sweep 14.
    """
    sizes = chunk_sizes(batch_size, num_chunks)
    if len(sizes) == 1:  # no sweeps either
        return 0
    return batch_size * (1 + num_sweeps) - sizes[-1]
