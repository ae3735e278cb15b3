"""Computes losses of image-text pairs in tiles that stay in cache: never the `[B, B]` matrix.

A tile holds the logits of a block of candidates and a block of chosen examples, in units of ln 2:
`exp2` (2.5 times as fast as `exp` on a CPU) then turns them into odds. Everything is computed in
float32. Pure functions: no state, no randomness.

B: candidates, R: candidates of a tile (its rows), C: chosen examples (its columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jest_stream.types import Embeddings

LN2 = math.log(2.0)

# Chosen examples per tile. 512 x 512 products reach the speed of large ones.
_TILE_COLUMNS = 512
# Logits per tile. A CPU's core works on 512 KiB of them, which its level-2 cache holds together
# with as much scratch. A GPU wants few, large kernels: 64 MiB.
_CPU_TILE_PER_THREAD = 2**17
_GPU_TILE = 2**24
# How often columns are multiplied in pairs before the logarithm is taken. With 3, an eighth of the
# logarithms is left; more levels save less than they cost, since the columns get short.
_PRODUCT_LEVELS = 3


class Tile(NamedTuple):
    """Logits of some candidates and some chosen examples, under one model."""

    model: int
    """Position of the model among those given."""
    side: int
    """0: the candidates' images with the chosen texts; 1: their texts with the chosen images."""
    rows: slice
    """Its candidates."""
    columns: slice
    """Its chosen examples."""
    logits: Tensor
    """`[R, C]` float32 in units of ln 2; overwritten by the next tile, so free to be used up."""
    scratch: Tensor
    """`[R, C]` float32, to be written."""


def logit_tiles(
    candidates: Sequence[Embeddings], chosen: Sequence[Embeddings], *, with_bias: bool
) -> Iterator[Tile]:
    """Yields the logits of every pair of a candidate and a chosen example, both ways round.

    The models alternate within a block of pairs: their difference can be summed up as it arises,
    and equal models leave exactly zero.

    Args:
      candidates: for each model, `[B, D]` float32 embeddings.
      chosen: for each model, `[C, D]` float32 embeddings.
      with_bias: whether `logit_bias` counts. In a softmax it cancels.
    """
    num_candidates, num_chosen = len(candidates[0].image), len(chosen[0].image)
    # Blocks of equal width: 600 chosen make two of 300, not 512 and 88.
    num_blocks = math.ceil(num_chosen / _TILE_COLUMNS)
    block_size = math.ceil(num_chosen / num_blocks)
    tile_rows = max(1, _tile_size(candidates[0].image.device) // block_size)
    # One allocation for all tiles: logits in its first half, scratch in the second.
    space = candidates[0].image.new_empty(2, block_size * min(tile_rows, num_candidates))
    for start in range(0, num_chosen, block_size):
        columns = slice(start, min(start + block_size, num_chosen))
        # The scale goes into the smaller factor, and with it the unit of ln 2.
        scaled = [
            [side[columns] * (model.logit_scale / LN2) for side in (model.text, model.image)]
            for model in chosen
        ]
        for first in range(0, num_candidates, tile_rows):
            rows = slice(first, min(first + tile_rows, num_candidates))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits, scratch = space[:, : shape[0] * shape[1]].view(2, *shape)
            for side in (0, 1):
                for index, model in enumerate(candidates):
                    candidate = (model.image, model.text)[side][rows]
                    torch.mm(candidate, scaled[index][side].T, out=logits)
                    if with_bias:
                        logits.add_(model.logit_bias / LN2)
                    yield Tile(index, side, rows, columns, logits, scratch)


def negative_loss_sums(logits: Tensor, scratch: Tensor) -> Tensor:
    """Returns each candidate's loss over the tile's pairs, none of which match: `[R]`, in nats.

    Sums softplus(x) = max(x, 0) + log(1 + e^-|x|) over the columns. One logarithm is as dear as ten
    additions at best, so those of eight columns are taken of their product.

    Args:
      logits: `[R, C]` in units of ln 2; used up.
      scratch: `[R, C]`; overwritten.
    """
    positive = torch.clamp_min(logits, 0.0, out=scratch)
    sums = positive.sum(1).mul_(LN2)
    odds = logits.sub_(positive, alpha=2.0).exp2_()  # x - 2 max(x, 0) = -|x|
    # The running product is kept less one: (1 + p)(1 + q) - 1 = p + q + pq. All terms are positive:
    # no digit is lost however small they are. (The product itself would lose them: 1 + e^-16 is 6 %
    # off in float32.)
    for _ in range(_PRODUCT_LEVELS):
        num_columns = odds.shape[1]
        half = num_columns // 2
        if half == 0:
            break
        # Columns [0 1 2 3 4]: 0 takes in 3, 1 takes in 4, the one in the middle stays: [03 14 2].
        low, high = odds[:, :half], odds[:, num_columns - half :]
        low.addcmul_(low, high).add_(high)
        odds = odds[:, : num_columns - half]
    return sums.add_(odds.log1p().sum(1))


def negative_losses(logits: Tensor) -> Tensor:
    """Returns the loss of each of the tile's pairs, none of which match: `[R, C]`, in nats."""
    return torch.nn.functional.softplus(logits * LN2)


def add_exponentials(total: Tensor, logits: Tensor) -> None:
    """Adds the tile's columns to a running log-sum-exp, in place.

    Args:
      total: `[R]` logarithm to base 2 of the sum so far, -inf at the start; updated.
      logits: `[R, C]` in units of ln 2; used up.
    """
    # log2(2^total + sum of 2^x) with the largest exponent taken out: no 2^x overflows.
    peak = torch.maximum(total, logits.amax(1))
    exponentials = logits.sub_(peak[:, None]).exp2_().sum(1)
    torch.add(peak, exponentials.add_(total.sub(peak).exp2_()).log2_(), out=total)


def own_logits(embeddings: Embeddings, *, with_bias: bool) -> Tensor:
    """Returns the logit of each example's own image and text: `[B]` float32.

    Args:
      embeddings: `[B, D]` float32.
      with_bias: whether `logit_bias` counts.
    """
    image, text = embeddings.image, embeddings.text
    dots = image.new_empty(len(image))
    # In tiles too: the products of all rows would take as much memory as the embeddings.
    step = max(1, _tile_size(image.device) // image.shape[1])
    for start in range(0, len(image), step):
        rows = slice(start, start + step)
        dots[rows] = (image[rows] * text[rows]).sum(1)
    logits = dots.mul_(embeddings.logit_scale)
    return logits.add_(embeddings.logit_bias) if with_bias else logits


def _tile_size(device: torch.device) -> int:
    """Returns how many numbers a tile should hold."""
    if device.type == "cpu":
        return _CPU_TILE_PER_THREAD * torch.get_num_threads()
    return _GPU_TILE
