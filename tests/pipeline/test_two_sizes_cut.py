"""A selection is cut in two parts that together are the whole; the small one is made smaller.

pytest tests/pipeline/test_two_sizes_cut.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from torch import Tensor

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.pipeline.device import PendingSelection
from jest_stream.pipeline.two_sizes import TwoSizes, small_part
from jest_stream.types import Selection
from jest_stream.views import Columns, PixelTable

pytestmark = pytest.mark.usefixtures("no_leaks")

CPU = torch.device("cpu")
AT_4_PX = ScoringConfig(image_size=4)


def selection_of(indices: list[int]) -> PendingSelection:
    """These candidates in this order, each with a tenth of its number as its weight."""
    return PendingSelection(
        Selection(
            indices=torch.tensor(indices),
            weights=torch.tensor(indices) / 10,
            effective_support=torch.tensor([6.0, 5.0]),
            selected_score=torch.tensor(1.5),
            candidate_score=torch.tensor(0.5),
            group_counts=torch.tensor([3]),
            quota_excess=torch.tensor([1]),
            is_finite=torch.tensor(True),
        )
    )


def candidates(size: int = 20) -> Columns:
    """Candidate n, with n as every pixel and every word."""
    numbers = torch.arange(size, dtype=torch.uint8)
    return {
        "image": numbers[:, None, None, None].expand(size, 3, 8, 8).contiguous(),
        "text": numbers.long()[:, None].expand(size, 4).contiguous(),
        "key": [f"key {number}" for number in range(size)],
        "group": ["unused"] * size,
    }


@pytest.mark.parametrize(
    ("fraction", "rest", "small"),
    [
        # The draw order is 17, 3, 11, 5, 2, 13, 8, 19.
        (0.25, [17, 3, 5, 2, 13, 19], [11, 8]),
        (0.50, [17, 11, 2, 8], [3, 5, 13, 19]),
        (0.10, [17, 3, 11, 5, 13, 8, 19], [2]),  # 0.8 of an example is one
        (0.90, [5], [17, 3, 11, 2, 13, 8, 19]),  # 7.2 are seven
    ],
)
def test_each_of_the_chosen_is_in_one_part_in_draw_order(
    fraction: float, rest: list[int], small: list[int]
) -> None:
    two_sizes = TwoSizes(fraction, 8, AT_4_PX)
    parts = two_sizes.split(selection_of([17, 3, 11, 5, 2, 13, 8, 19]))
    for part, expected in zip(parts, (rest, small), strict=True):
        for found in (part.on_host(), part.on_device):
            assert found.indices.tolist() == expected
            assert torch.equal(found.weights, torch.tensor(expected) / 10)


def test_the_statistics_of_a_part_are_those_of_the_whole_draw() -> None:
    whole = selection_of([17, 3, 11, 5])
    for part in TwoSizes(0.5, 4, AT_4_PX).split(whole):
        for name in ("effective_support", "selected_score", "group_counts", "quota_excess"):
            assert getattr(part.on_host(), name) is getattr(whole.on_host(), name)


def test_a_part_of_a_selection_still_on_its_way_waits_for_nothing_until_it_is_read() -> None:
    """The host is asked for the indices when rows of lists are taken, not when it is cut."""
    whole, reads = selection_of([17, 3, 11, 5]), list[str]()

    def read_back() -> Selection:
        reads.append("read")
        return whole.on_host()

    on_its_way = PendingSelection(whole.on_device, read_back=read_back, has_come=lambda: False)
    rest, small = TwoSizes(0.5, 4, AT_4_PX).split(on_its_way)
    assert not rest.is_known() and not small.is_known() and reads == []
    assert small.take_rows({"key": candidates()["key"]}) == {"key": ["key 3", "key 5"]}
    assert rest.on_host().indices.tolist() == [17, 11]
    assert reads == ["read"], "both parts share one read"


def test_the_small_part_has_its_rows_scaled_and_its_columns_renamed() -> None:
    two_sizes = TwoSizes(0.5, 4, AT_4_PX)
    _, part = two_sizes.split(selection_of([17, 3, 11, 5]))
    small = two_sizes.small(candidates(), part, CPU)
    assert sorted(small) == ["small_image", "small_key", "small_text", "small_weight"]
    assert small["small_key"] == ["key 3", "key 5"]
    assert small["small_text"].tolist() == [[3] * 4, [5] * 4]
    assert torch.equal(small["small_weight"], torch.tensor([0.3, 0.5]))
    expected = torch.tensor([3, 5], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    assert torch.equal(small["small_image"], expected)


def test_pixels_are_finished_before_they_are_scaled() -> None:
    """A checkerboard of 100 and 101 has the mean 100.5, which whole numbers cannot hold."""
    board = 100 + (torch.arange(8)[:, None] + torch.arange(8)) % 2
    columns = candidates(4) | {"image": board.expand(4, 3, 8, 8).to(torch.uint8)}
    table = PixelTable([Tensor.float], takes_pictures=False)
    two_sizes = TwoSizes(0.5, 4, AT_4_PX, table)
    _, part = two_sizes.split(selection_of([3, 2, 1, 0]))
    image = two_sizes.small(columns, part, CPU)["small_image"]
    assert image.dtype == torch.float32
    assert torch.allclose(image[..., 1:3, 1:3], torch.tensor(100.5), atol=0.05)


def test_a_view_of_several_tensors_is_scaled_where_it_is_an_image() -> None:
    columns = candidates(4)
    columns["image/pixels"], columns["image/mask"] = columns.pop("image"), torch.ones(4, 8)
    two_sizes = TwoSizes(0.5, 4, AT_4_PX)
    _, part = two_sizes.split(selection_of([3, 2, 1, 0]))
    small = two_sizes.small(columns, part, CPU)
    assert small["small_image/pixels"].shape == (2, 3, 4, 4)
    assert small["small_image/mask"].shape == (2, 8)


def batch_of(image: Any, small_image: Any) -> Columns:
    made: Columns = {}
    for name, view in (("image", image), ("small_image", small_image)):
        shapes = view if isinstance(view, dict) else {"": view}
        made |= {f"{name}/{k}" if k else name: torch.zeros(s) for k, s in shapes.items()}
    return made


@pytest.mark.parametrize(
    ("image", "small_image"),
    [
        ((6, 3, 8, 8), (2, 3, 8, 8)),
        ({"pixels": (6, 3, 8, 8), "mask": (6, 5)}, {"pixels": (2, 3, 8, 8), "mask": (2, 5)}),
    ],
)
def test_two_parts_of_one_size_are_an_error(image: Any, small_image: Any) -> None:
    batch = batch_of(image, small_image)
    with pytest.raises(ConfigError, match="train view and score view are both 3 x 8 x 8, so there"):
        TwoSizes(0.25, 8, ScoringConfig()).check(batch)
    # The same pixels in larger patches, or with some left out, are fewer tokens.
    TwoSizes(0.25, 8, ScoringConfig(patch_size=4)).check(batch)
    TwoSizes(0.25, 8, ScoringConfig(token_fraction=0.5)).check(batch)


@pytest.mark.parametrize(
    ("image", "small_image"),
    [
        ((6, 3, 8, 8), (2, 3, 4, 4)),
        ({"pixels": (6, 3, 8, 8), "mask": (6, 5)}, {"pixels": (2, 3, 4, 4), "mask": (2, 5)}),
    ],
)
def test_two_parts_of_two_sizes_are_none(image: Any, small_image: Any) -> None:
    TwoSizes(0.25, 8, ScoringConfig()).check(batch_of(image, small_image))


def test_views_that_cannot_differ_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ConfigError, match="score_view_fraction=0.5, but the score view is the tra"):
        TwoSizes.of(0.5, 8, ScoringConfig(), has_train_view=False)


@pytest.mark.parametrize(
    ("scoring", "has_train_view"),
    [
        (ScoringConfig(), True),
        (ScoringConfig(image_size=4), False),
        (ScoringConfig(patch_size=4), False),
        (ScoringConfig(token_fraction=0.5), False),
    ],
)
def test_views_that_can_differ_are_cut(scoring: ScoringConfig, has_train_view: bool) -> None:
    assert TwoSizes.of(0.5, 8, scoring, has_train_view=has_train_view) is not None
    assert TwoSizes.of(0, 8, scoring, has_train_view=has_train_view) is None


def test_the_small_part_of_a_batch_has_plain_names() -> None:
    batch = {"image": 1, "small_image/pixels": 2, "key": ["a"], "small_key": ["b"]}
    assert small_part(batch) == {"image/pixels": 2, "key": ["b"]}
    assert small_part({"image": 1, "key": ["a"]}) == {}
