"""Batches have two sizes: a part of each sub-batch comes as it was scored, for training there too.

pytest tests/test_two_sizes.py
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, to_tensor, tokenize
from torch import Tensor

from jest_stream import JESTDataset, ScoringConfig, SelectionConfig
from jest_stream.demo.model import HashTokenizer, TwoTowerModel
from jest_stream.errors import ConfigError
from jest_stream.pipeline.two_sizes import small_rows

pytestmark = pytest.mark.usefixtures("no_leaks")

SHARDS = {"num_shards": 6, "examples_per_shard": 20}
"""Six shards of 20 examples, pictures of 32 px."""


def picture(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jest(shards: Any, **options: Any) -> JESTDataset:
    """Batches of 8 out of 24, scored at 16 px of 32."""
    torch.manual_seed(0)
    models = {"learner": TwoTowerModel(width=32), "reference": TwoTowerModel(width=32)}
    defaults = {
        **models,
        "transform": picture,
        "tokenizer": lambda text: HashTokenizer(8)(text)[0],
        "scoring": ScoringConfig(image_size=16),
        "score_view_fraction": 0.5,
        "batch_size": 8,
        "super_batch_size": 24,
        "selection": SelectionConfig(num_chunks=4),
    }
    return JESTDataset(shards, **{**defaults, **options})


def test_the_small_are_spread_evenly_over_the_draw_order() -> None:
    assert small_rows(8, 4) == [1, 3, 5, 7]
    assert small_rows(8, 2) == [2, 6]
    assert small_rows(10, 3) == [1, 5, 8]
    for batch_size, num_small, num_chunks in [(256, 128, 16), (256, 64, 16), (1024, 256, 32)]:
        rows = torch.tensor(small_rows(batch_size, num_small))
        assert len(rows.unique()) == num_small
        per_chunk = (rows // (batch_size // num_chunks)).bincount(minlength=num_chunks)
        assert set(per_chunk.tolist()) == {num_small // num_chunks}


def test_a_batch_has_two_parts_and_all_of_the_chosen(shards: list[str]) -> None:
    def first(**options: Any) -> list[Any]:
        with jest(shards, **options) as dataset:
            return list(islice(dataset, 3))

    runs = first(score_view_fraction=0, as_dict=True), first(as_dict=True), first()
    for plain, batch, parts in zip(*runs, strict=True):
        assert batch["key"] == plain["key"][0::2] and batch["small_key"] == plain["key"][1::2]
        for name in ("text", "weight"):
            assert torch.equal(batch[name], plain[name][0::2])
            assert torch.equal(batch[f"small_{name}"], plain[name][1::2])
        assert torch.equal(batch["image"], plain["image"][0::2])
        expected = [
            np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), 3))
            for image in plain["image"][1::2]
        ]
        got = batch["small_image"].permute(0, 2, 3, 1).numpy()
        assert got.shape == (4, 16, 16, 3)
        assert np.abs(got.astype(int) - np.stack(expected)).max() <= 3
        (images, texts), (small_images, small_texts) = parts
        assert torch.equal(images, batch["image"]) and torch.equal(texts, batch["text"])
        assert torch.equal(small_images, batch["small_image"])
        assert torch.equal(small_texts, batch["small_text"])


@pytest.mark.parametrize(("fraction", "num_small"), [(0.25, 2), (0.3, 2), (0.9, 7), (0.1, 1)])
def test_shares_become_numbers_of_examples(
    shards: list[str], fraction: float, num_small: int
) -> None:
    with jest(shards, score_view_fraction=fraction) as dataset:
        for (images, texts), (small_images, small_texts) in islice(dataset, 2):
            assert len(images) == len(texts) == 8 - num_small
            assert len(small_images) == len(small_texts) == num_small
        assert dataset.metrics()["samples_trained"] == 16


def test_only_the_rest_get_the_train_view(shards: list[str]) -> None:
    made = []

    def train_transform(image: Image.Image) -> Tensor:
        made.append(image)
        return picture(image.resize((48, 48)))

    options = {"train_transform": train_transform, "scoring": ScoringConfig()}
    with jest(shards, **options, score_view_fraction=0.25) as dataset:
        (images, _), (small_images, _) = next(iter(dataset))
    assert images.shape == (6, 3, 48, 48) and small_images.shape == (2, 3, 32, 32)
    assert len(made) == 6


def test_a_train_view_at_random_is_the_same_in_every_run(shards: list[str]) -> None:
    options: dict[str, Any] = {"learner": TinyTwoTower(seed=1), "reference": TinyTwoTower(seed=2)}
    options |= {"transform": to_tensor, "tokenizer": tokenize, "train_transform": flipped}
    # The model takes 8 px; larger patches are not asked for, so both views would be of one size.
    with (
        jest(shards, **options, scoring=ScoringConfig()) as dataset,
        pytest.raises(ConfigError, match="train view and score view are both 3 x 8 x 8, so there"),
    ):
        next(iter(dataset))


def test_it_is_deterministic_and_resumes(shards: list[str]) -> None:
    with jest(shards, as_dict=True) as whole:
        first = list(islice(whole, 5))
    with jest(shards, as_dict=True) as dataset:
        iterator = iter(dataset)
        for _ in range(2):
            next(iterator)
        state = dataset.state_dict()
    with jest(shards, as_dict=True) as resumed:
        resumed.load_state_dict(state)
        for expected, batch in zip(first[2:], resumed, strict=False):
            assert batch["small_key"] == expected["small_key"]
            assert torch.equal(batch["small_image"], expected["small_image"])
            assert torch.equal(batch["image"], expected["image"])


def test_uniform_batches_have_two_sizes_too(shards: list[str]) -> None:
    options = {"selection": SelectionConfig(method="uniform"), "super_batch_size": None}
    models = {"learner": None, "reference": None}
    with jest(shards, **options, **models) as dataset:
        (images, _), (small_images, _) = next(iter(dataset))
    assert images.shape == (4, 3, 32, 32) and small_images.shape == (4, 3, 16, 16)


def test_named_tensors_have_two_sizes_too(shards: list[str]) -> None:
    options = {"transform": lambda image: {"pixel_values": picture(image)}}
    models = {"learner": None, "reference": None, "selection": SelectionConfig(method="uniform")}
    with jest(shards, **options, **models) as dataset:
        (images, _), (small_images, _) = next(iter(dataset))
    assert images["pixel_values"].shape == (4, 3, 32, 32)
    assert small_images["pixel_values"].shape == (4, 3, 16, 16)


def test_larger_patches_make_two_sizes_of_one(shards: list[str]) -> None:
    options = {"scoring": ScoringConfig(patch_size=16), "super_batch_size": None}
    models = {"learner": None, "reference": None, "selection": SelectionConfig(method="uniform")}
    with jest(shards, **options, **models) as dataset:
        (images, _), (small_images, _) = next(iter(dataset))
    assert images.shape == small_images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("fraction", [-0.5, 1.0, 0.01, 0.99, 2])
def test_shares_that_leave_a_part_empty_are_refused(shards: list[str], fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"score_view_fraction={float(fraction)} of batch_size=8"):
        jest(shards, score_view_fraction=fraction)


def test_one_size_cannot_make_two(shards: list[str]) -> None:
    with pytest.raises(
        ConfigError, match="score view is the train view, so.*image_size=...\\) bel"
    ):
        jest(shards, scoring=ScoringConfig())
    with pytest.raises(ConfigError, match="score_view_fraction must be a number, got 'half'"):
        jest(shards, score_view_fraction="half")
    with pytest.raises(ConfigError, match="score_view_fraction must be finite, got nan"):
        jest(shards, score_view_fraction=float("nan"))
    with (
        jest(shards, scoring=ScoringConfig(image_size=32)) as dataset,
        pytest.raises(ConfigError, match="both 3 x 32 x 32, so there are no two sizes"),
    ):
        next(iter(dataset))
