"""Rows of the score view are outputs of transforms and processors, one example at a time.

pytest tests/test_views.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.shards import make_example

from jest_stream.config import Limits
from jest_stream.errors import BadExampleError, UnsafeExampleError
from jest_stream.views.columns import collate
from jest_stream.views.score import ScoreView
from jest_stream.views.train import TrainView

pytestmark = pytest.mark.usefixtures("no_leaks")

N, D, L = 9, 12, 5  # patches, their values, tokens


def row_of(image: Any, text: Any, **options: Any) -> dict[str, Any]:
    view = ScoreView(
        keys=("jpg", "txt"),
        learner=(lambda _: image, lambda _: text),
        reference=(None, None),
        keep_image=False,
        **options,
    )
    return view(make_example(0))


def shapes(row: dict[str, Any], name: str) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in row.items() if key.split("/")[0] == name}


PATCHES = {"patches": (N, D), "patch_coord": (N, 2), "patch_valid": (N,)}
NAFLEX = {"pixel_values": (N, D), "pixel_attention_mask": (N,), "spatial_shapes": (2,)}
CLIP = {"pixel_values": (3, 8, 8)}
GREY = {"pixel_values": (1, 8, 8)}
MASKED = {"pixel_values": (1, 8, 8), "pixel_mask": (8, 8)}


@pytest.mark.parametrize("sizes", [PATCHES, NAFLEX, CLIP, GREY, MASKED])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_processor_may_add_a_batch_dimension_to_images(
    sizes: dict[str, tuple[int, ...]], is_batch: bool
) -> None:
    lead = (1,) if is_batch else ()
    row = row_of({key: torch.zeros(lead + size) for key, size in sizes.items()}, torch.zeros(L))
    assert shapes(row, "image") == {f"image/{key}": list(size) for key, size in sizes.items()}


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask")])
@pytest.mark.parametrize("length", [1, L])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_tokenizer_may_add_a_batch_dimension_to_texts(
    names: tuple[str, ...], length: int, is_batch: bool
) -> None:
    size = (1, length) if is_batch else (length,)
    row = row_of(torch.zeros(3, 8, 8), {name: torch.zeros(size) for name in names})
    assert shapes(row, "text") == {f"text/{name}": [length] for name in names}


def test_rows_of_patches_collate_to_one_dimension_more() -> None:
    image = {key: torch.zeros(1, *size) for key, size in NAFLEX.items()}
    columns = collate([row_of(image, torch.zeros(L)) for _ in range(4)])
    assert shapes(columns, "image") == {f"image/{k}": [4, *size] for k, size in NAFLEX.items()}


def test_limits_hold_for_members_functions_and_train_views() -> None:
    limits = Limits(max_pixels=32 * 32 - 1)
    for key in ("jpg", lambda example: make_example(1)["jpg"]):
        view = ScoreView(
            keys=(key, "txt"),
            learner=(torch.zeros, torch.zeros),
            reference=(None, None),
            keep_image=False,
            limits=limits,
        )
        with pytest.raises(UnsafeExampleError, match="the limit is 1,023"):
            view(make_example(0))
    train = TrainView(transform=lambda image: image, seed=0, rank=0, limits=limits)
    chosen = {"raw_image": [("jpg", make_example(0)["jpg"])], "key": ["0"], "shard": [""]}
    with pytest.raises(UnsafeExampleError, match="the limit is 1,023"):
        train(chosen, step=0, positions=[0])


def test_a_missing_member_is_named_with_those_that_are_there() -> None:
    view = ScoreView(
        keys=("png", "txt"), learner=(None, None), reference=(None, None), keep_image=False
    )
    expected = r"no member for image_key='png', only \['jpg', 'json', 'txt'\] \(should image_key be"
    with pytest.raises(BadExampleError, match=expected) as raised:
        view(make_example(0))
    assert raised.value.reason == "missing_image"
