"""Batches have the form that the loop asked for, and a share of them may stay at the score view.

pytest tests/pipeline/test_batch_form.py
"""

from __future__ import annotations

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.pipeline.batches import structured
from jest_stream.pipeline.two_sizes import TwoSizes, small_rows
from jest_stream.views import Columns

pytestmark = pytest.mark.usefixtures("no_leaks")

IMAGE, TEXT = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.int64)
SMALL_IMAGE, SMALL_TEXT = torch.ones(1, 3, 4, 4), torch.ones(1, 4, dtype=torch.int64)


def columns(*, small: bool = False) -> Columns:
    found = {"image": IMAGE, "text": TEXT, "key": ["a", "b"], "weight": torch.ones(2)}
    if small:
        found |= {"small_image": SMALL_IMAGE, "small_text": SMALL_TEXT}
        found |= {"small_key": ["c"], "small_weight": torch.ones(1)}
    return found


def test_a_batch_is_a_pair_by_default() -> None:
    image, text = structured(columns(), as_dict=False)
    assert image is IMAGE and text is TEXT


def test_a_batch_of_two_sizes_is_a_pair_of_pairs() -> None:
    large, small = structured(columns(small=True), as_dict=False)
    assert large[0] is IMAGE and large[1] is TEXT
    assert small[0] is SMALL_IMAGE and small[1] is SMALL_TEXT


def test_a_dict_names_everything() -> None:
    assert list(structured(columns(), as_dict=True)) == ["image", "text", "key", "weight"]
    both = structured(columns(small=True), as_dict=True)
    assert both["small_key"] == ["c"] and both["small_image"] is SMALL_IMAGE


def test_a_view_of_several_tensors_stays_a_mapping() -> None:
    named = {"image/pixels": IMAGE, "image/mask": TEXT, "text": TEXT, "key": ["a", "b"]}
    image, _ = structured(named, as_dict=False)
    assert image.keys() == {"pixels", "mask"} and image["pixels"] is IMAGE


@pytest.mark.parametrize(
    ("batch_size", "num_small", "rows"),
    [
        (8, 2, [2, 6]),
        (8, 4, [1, 3, 5, 7]),
        (5, 1, [2]),
        (4, 3, [0, 2, 3]),
    ],
)
def test_small_rows_are_spread_over_the_draw_order(
    batch_size: int, num_small: int, rows: list[int]
) -> None:
    """A share of every chunk, first or last drawn, is trained small."""
    assert small_rows(batch_size, num_small) == rows


@pytest.mark.parametrize(("fraction", "batch_size"), [(0.01, 8), (0.99, 8), (1.0, 8), (0.5, 1)])
def test_each_size_needs_an_example(fraction: float, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"score_view_fraction={fraction} of batch_size="):
        TwoSizes(fraction, batch_size, ScoringConfig(image_size=4))
