"""Chooses the image tokens to keep where only some are scored, and drops the others.

Pure functions and layers without weights. Shapes: B: images, P: tokens that stand before those of
the image (class, registers), N: image tokens, K: image tokens kept, W: width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GOLDEN = (math.sqrt(5) - 1) / 2


def kept_tokens(grid: tuple[int, int], fraction: float) -> list[int]:
    """Returns the positions of the kept tokens of a grid, in order: `max(1, round(fraction * N))`.

    Every row gives its share, evenly spaced; each row starts elsewhere (by the golden ratio), since
    every second token of an even grid would be every second column. Of 4 x 4 tokens half are

        x . x .
        . x . x
        x . x .
        . x . x

    Args:
      grid: rows and columns of tokens.
      fraction: share that is kept, in (0, 1].
    """
    rows, columns = grid
    num_kept = max(1, round(fraction * rows * columns))
    kept = []
    for row in range(rows):
        # Differences of cumulative shares add up exactly: 7 of 4 rows are 1, 2, 2 and 2.
        share = (row + 1) * num_kept // rows - row * num_kept // rows
        start = row * _GOLDEN % 1
        kept += [row * columns + int((at + start) * columns / share) for at in range(share)]
    return kept


class KeepTokens(nn.Module):
    """Keeps the tokens before the image's, and some of the image's: `[B, P + N, W]` in."""

    def __init__(self, kept: Sequence[int], num_prefix: int) -> None:
        super().__init__()
        self._kept = list(kept)
        self._num_prefix = num_prefix
        self._indices: Tensor | None = None  # no buffer: it belongs in no checkpoint

    def indices(self, device: torch.device) -> Tensor:
        """Returns `[K]`, the kept among the image's tokens, on `device`."""
        if self._indices is None or self._indices.device != device:
            self._indices = torch.tensor(self._kept, device=device)
        return self._indices

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns `[B, P + K, W]`, the prefix and the kept, of `[B, P + N, W]`."""
        prefix, image = tokens[:, : self._num_prefix], tokens[:, self._num_prefix :]
        return torch.cat([prefix, image.index_select(1, self.indices(tokens.device))], dim=1)

    def after(self, module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
        """Returns the kept of the tokens that `module` made: a forward hook."""
        kept: Tensor = self(tokens)
        return kept


class KeepTokensAndSay(KeepTokens):
    """As `KeepTokens`, with their indices for rotary embeddings: `[B, P + K, W]`, `[B, K]`."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns the tokens that are kept, and their indices."""
        indices = self.indices(tokens.device).expand(len(tokens), -1)
        return super().forward(tokens), indices
