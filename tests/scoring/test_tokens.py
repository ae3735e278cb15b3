"""The kept tokens are evenly spread, the same for every image.

Run: pytest tests/scoring/test_tokens.py
"""

from __future__ import annotations

import pytest
import torch

from jest_stream.scoring.tokens import KeepTokens, KeepTokensAndSay, kept_tokens


def test_half_of_a_small_grid_by_hand() -> None:
    kept = kept_tokens((4, 4), 0.5)
    #               x . x .      . x . x     x . x .      . x . x
    assert kept == [0, 2, 5, 7, 8, 10, 13, 15]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (14, 14), (16, 9), (32, 32)])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.72, 0.99, 1.0])
def test_every_row_and_column_gives_its_share(grid: tuple[int, int], fraction: float) -> None:
    rows, columns = grid
    kept = kept_tokens(grid, fraction)
    num_kept = max(1, round(fraction * rows * columns))
    assert len(set(kept)) == len(kept) == num_kept
    assert kept == sorted(kept) and 0 <= kept[0] and kept[-1] < rows * columns
    by_row = torch.tensor(kept).div(columns, rounding_mode="floor").bincount(minlength=rows)
    assert by_row.max() - by_row.min() <= 1
    halves = sum(token % columns < columns / 2 for token in kept)
    if columns % 2 == 0:  # neither side of the image is left out
        assert abs(halves - num_kept / 2) <= max(1, rows / 4)


def test_tokens_before_the_images_stay() -> None:
    tokens = torch.arange(2 * 6).reshape(2, 6, 1)
    keep = KeepTokens([1, 3], num_prefix=2)
    assert keep(tokens)[0].flatten().tolist() == [0, 1, 3, 5]
    assert keep(tokens)[1].flatten().tolist() == [6, 7, 9, 11]
    assert not keep.state_dict() and not list(keep.buffers())
    kept, indices = KeepTokensAndSay([1, 3], num_prefix=2)(tokens)
    assert torch.equal(kept, keep(tokens)) and indices.tolist() == [[1, 3], [1, 3]]
