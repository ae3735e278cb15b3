"""The oracle is the paper's algorithm written down plainly, with `[B, B]` matrices and loops.

Nothing here is fast or careful with memory. Everything is float64 unless asked otherwise. Noise is
passed in, so that choices can be compared one by one with those of `jest_stream.selection`.

B: super-batch size, b: batch size, C: number of chunks. `noise` is `[C, B]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from jest_stream.types import Embeddings


def logits(embeddings: Embeddings, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns `logit_scale * image @ text.T + logit_bias`: `[B, B]`."""
    image, text = embeddings.image.to(dtype), embeddings.text.to(dtype)
    return image @ text.T * float(embeddings.logit_scale) + float(embeddings.logit_bias)


def sigmoid_pair_losses(embeddings: Embeddings, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the sigmoid loss of every pair (Eq. 2): `[B, B]`, in nats."""
    x = logits(embeddings, dtype)
    matches = torch.eye(len(x), dtype=torch.bool)
    return softplus(torch.where(matches, -x, x))


def score_matrix(
    learner: Embeddings | None,
    reference: Embeddings | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Returns learner loss minus reference loss, a missing one being 0: `[B, B]`."""
    scores = torch.zeros((), dtype=dtype)
    if learner is not None:
        scores = scores + sigmoid_pair_losses(learner, dtype)
    if reference is not None:
        scores = scores - sigmoid_pair_losses(reference, dtype)
    return scores


def paper_listing(
    scores: Tensor, *, batch_size: int, num_chunks: int, noise: Tensor, gain: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Returns the chosen indices and, for each chunk, the scores it was drawn by.

    Algorithm 1, line by line: one-hot masks, masked sums over the whole matrix for every chunk.
    Repaired where the print cannot run (drawing without replacement by Gumbel-top-k, -inf instead
    of subtracting a large number, chunk sizes that add up).
    """
    num_images = len(scores)
    logits_ii = scores.diagonal()
    chunk_sizes = [batch_size // num_chunks] * num_chunks
    for extra in range(batch_size % num_chunks):
        chunk_sizes[extra] += 1
    inds = torch.empty(0, dtype=torch.int64)
    drawn_by = []
    for k, n_draws in enumerate(chunk_sizes):
        is_sampled = torch.eye(num_images, dtype=scores.dtype)[inds].sum(0)
        logits_ij = (scores * is_sampled.view(num_images, 1)).sum(0)
        logits_ji = (scores * is_sampled.view(1, num_images)).sum(1)
        marginal = (logits_ii + logits_ij + logits_ji).masked_fill(is_sampled > 0, -math.inf)
        drawn_by.append(marginal)
        new_inds = (gain * marginal + noise[k]).topk(n_draws).indices
        inds = torch.cat((inds, new_inds))
    return inds, drawn_by


def drawn_again(
    scores_given: Callable[[list[int]], Sequence[float]],
    *,
    sizes: list[int],
    noise: Tensor,
    gain: float = 1.0,
) -> list[list[int]]:
    """Returns the chunks after sweeps: each drawn in turn, then again given all the others.

    Args:
      scores_given: the score of every candidate given those chosen.
      sizes: of the chunks.
      noise: `[C, B]` without sweeps, C rows more for each.
    """
    chunks: list[list[int]] = []
    for turn, row in enumerate(noise):
        number = turn % len(sizes)
        others = [k for i, chunk in enumerate(chunks) if i != number for k in chunk]
        keys = gain * torch.as_tensor(scores_given(others), dtype=torch.float64) + row
        keys[others] = -math.inf
        chunks[number : number + 1] = [keys.topk(sizes[number]).indices.tolist()]
    return chunks


def draw_within(
    keys: list[float], members: list[int], *, size: int, least: list[int], most: list[int]
) -> list[int]:
    """Returns the `size` candidates with the largest keys that keep to the bounds, in draw order.

    Args:
      keys: of the candidates; -inf for candidates that cannot be drawn.
      members: the group of each candidate.
      least: how many of each group must be drawn.
      most: how many of each group may be drawn.
    """
    by_key = sorted(range(len(keys)), key=lambda k: -keys[k])
    counts = [0] * len(least)
    drawn = []
    for bounds in (least, most):  # first what must be, then the best of what may be
        for k in by_key:
            room = len(drawn) < size and counts[members[k]] < bounds[members[k]]
            if room and k not in drawn and keys[k] > -math.inf:
                drawn.append(k)
                counts[members[k]] += 1
    return sorted(drawn, key=lambda k: -keys[k])


def listing_within(
    scores: Tensor,
    members: list[int],
    *,
    sizes: list[int],
    least: list[list[int]],
    most: list[list[int]],
    noise: Tensor,
) -> list[int]:
    """Returns what the paper's listing chooses if each chunk must keep to cumulative bounds.

    With more rows of noise than chunks, they are drawn again in turn, given the others and within
    the bounds of the whole.
    """
    chunks: list[list[int]] = []
    for turn, row in enumerate(noise):
        number = turn % len(sizes)
        others = [k for i, chunk in enumerate(chunks) if i != number for k in chunk]
        bounds = -1 if turn >= len(sizes) else number
        counts = [sum(members[j] == group for j in others) for group in range(len(least[bounds]))]
        marginal = scores.diagonal() + scores[others].sum(0) + scores[:, others].sum(1)
        marginal[others] = -math.inf
        drawn = draw_within(
            (marginal + row).tolist(),
            members,
            size=sizes[number],
            least=[bound - count for bound, count in zip(least[bounds], counts, strict=True)],
            most=[bound - count for bound, count in zip(most[bounds], counts, strict=True)],
        )
        chunks[number : number + 1] = [drawn]
    return [k for chunk in chunks for k in chunk]


def softmax_logits(embeddings: Embeddings) -> list[list[float]]:
    """Returns the logits without their bias, which cancels in a softmax: `[B][B]`."""
    x: list[list[float]] = logits(replace(embeddings, logit_bias=0.0)).tolist()
    return x


def softmax_streaming_score(
    learner: Embeddings | None, reference: Embeddings | None, chosen: list[int]
) -> list[float]:
    """Returns each candidate's softmax loss against the chosen alone, learner minus reference."""
    total = [0.0] * len((learner or reference).image)
    for embeddings, sign in ((learner, 1), (reference, -1)):
        if embeddings is None:
            continue
        x = softmax_logits(embeddings)
        for k in range(len(total)):
            loss = -x[k][k]
            if chosen:
                over_texts = _log_sum_exp([x[k][j] for j in chosen])
                over_images = _log_sum_exp([x[j][k] for j in chosen])
                loss += (over_texts + over_images) / 2
            total[k] += sign * loss
    return total


def softmax_batch_loss(embeddings: Embeddings, batch: list[int]) -> float:
    """Returns the softmax loss of a batch, summed over its examples (Eq. 1), in nats."""
    x = softmax_logits(embeddings)
    loss = 0.0
    for i in batch:
        over_texts = _log_sum_exp([x[i][j] for j in batch])
        over_images = _log_sum_exp([x[j][i] for j in batch])
        loss += (over_texts + over_images) / 2 - x[i][i]
    return loss


def softmax_exact_marginal(
    learner: Embeddings | None, reference: Embeddings | None, chosen: list[int]
) -> list[float]:
    """Returns what each candidate adds to the batch's loss: the difference of two batch losses."""
    total = [0.0] * len((learner or reference).image)
    for embeddings, sign in ((learner, 1), (reference, -1)):
        if embeddings is None:
            continue
        before = softmax_batch_loss(embeddings, chosen)
        for k in range(len(total)):
            if k not in chosen:
                total[k] += sign * (softmax_batch_loss(embeddings, [*chosen, k]) - before)
    return total


def _log_sum_exp(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values))
