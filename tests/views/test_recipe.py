"""The origin of views is decided once, by the transforms alone, and shown.

pytest tests/views/test_recipe.py
"""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageDraw
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.shards import make_example, write_shards
from torch import Tensor
from torchvision import transforms as v1

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.config import Limits
from jest_stream.errors import BadExampleError, ConfigError, UnsafeExampleError
from jest_stream.views.compose import SplitCompose
from jest_stream.views.decode import Reduced, decode
from jest_stream.views.recipe import Recipe, make_recipe
from jest_stream.views.score import ScoreView

pytestmark = pytest.mark.usefixtures("no_leaks")


def recipe(
    transform: Any, train: Any = None, reference: Any = None, key: Any = "jpg", **options: Any
) -> Recipe:
    defaults: dict[str, Any] = {"train_view_from": "auto", "reduced_decoding": "auto"}
    return make_recipe(
        {"transform": transform, "reference_transform": reference, "train_transform": train},
        image_key=key,
        **{**defaults, **options},
    )


def val(size: int) -> Any:
    return image_transform(size, is_train=False)


def train(size: int) -> Any:
    return image_transform(size, is_train=True)


def broken(image: Any) -> Any:
    raise LookupError("not for such pictures")


def test_the_train_view_is_made_of_the_score_view_where_they_have_one_size() -> None:
    assert recipe(val(64), train(64)).train_view_from == "score_view"
    assert recipe(val(64), train(96)).train_view_from == "encoded"
    assert recipe(val(64), broken).train_view_from == "encoded"
    assert recipe(to_tensor, to_tensor).train_view_from == "encoded"  # nothing is kept as pixels
    assert recipe(val(64)).train_view_from is None
    assert recipe(val(64), train(64), train_view_from="encoded").train_view_from == "encoded"
    assert recipe(val(64), train(96), train_view_from="score_view").train_view_from == "score_view"


def test_the_decision_leaves_the_users_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    recipe(val(64), train(64))
    assert torch.equal(before, torch.get_rng_state())


def test_images_are_reduced_only_where_all_that_is_made_of_them_is_small() -> None:
    small = recipe(val(32), train(224)).reduction
    assert small is not None
    assert [small(size) for size in [(500, 375), (375, 500), (120, 90), (60, 60)]] == [4, 4, 1, 1]
    both = recipe(val(32), train(224), reference=val(112)).reduction
    assert both is not None and both((500, 375)) == 2
    assert recipe(val(32), train(224), reference=to_tensor).reduction is None
    assert recipe(val(32), train(32)).reduction is None  # the train view is made of it
    assert recipe(val(32)).reduction is None  # it is trained on
    assert recipe(val(32), reduced_decoding=True).reduction is not None
    assert recipe(val(32), train(224), reduced_decoding=False).reduction is None
    assert recipe(val(32), train(224), key=lambda example: example["jpg"]).reduction is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transform": to_tensor, "reduced_decoding": True}, "reduced_decoding=True needs to know"),
        ({"train_view_from": "encoded"}, "says what train_transform is given, but there is none"),
        ({"train_view_from": "score"}, "train_view_from must be one of 'auto', 'encoded'"),
        ({"reduced_decoding": "yes"}, "reduced_decoding must be one of 'auto', True, False"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    paths = write_shards(tmp_path, num_shards=1, examples_per_shard=8)
    defaults: dict[str, Any] = {"transform": val(32), "tokenizer": tokenize, "batch_size": 4}
    uniform = SelectionConfig(method="uniform")
    with pytest.raises(ConfigError, match=match):
        JESTDataset(paths, selection=uniform, **{**defaults, **options})


def drawn(width: int, height: int) -> bytes:
    """A JPEG with edges and texture."""
    image = Image.new("RGB", (width, height), (200, 220, 240))
    pen = ImageDraw.Draw(image)
    for i in range(30):
        box = (i * 13 % width, i * 29 % height, i * 13 % width + 60, i * 29 % height + 40)
        pen.ellipse(box, fill=(i * 40 % 256, i * 70 % 256, i * 90 % 256))
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    values = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (501, 333), (1003, 997)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_reduced_view_has_the_geometry_of_the_full_one_and_nearly_its_pixels(
    size: tuple[int, int], mode: str
) -> None:
    transform = image_transform(96, is_train=False, resize_mode=mode)
    made = recipe(transform, train(224))
    assert made.reduction is not None and isinstance(made.transform, SplitCompose)
    example = {"jpg": drawn(*size)}
    image = decode(example, "jpg", shrink=made.reduction)
    assert isinstance(image, Reduced) and image.full_size == size
    assert image.image.width < size[0]
    reduced, full = made.transform.of_reduced(image), made.transform(decode(example, "jpg"))
    assert reduced.shape == full.shape == (3, 96, 96)
    difference = (reduced.int() - full.int()).abs().float()
    assert difference.mean() < 1.5  # of 255; a shift by a pixel gives several times as much
    assert not torch.equal(reduced, full)


def test_limits_hold_for_the_full_size_of_what_is_decoded_reduced() -> None:
    made = recipe(val(32), train(224))
    view = ScoreView(
        keys=("jpg", "txt"),
        learner=(made.transform, tokenize),
        reference=(None, None),
        keep_image=True,
        limits=Limits(max_pixels=500 * 375 - 1),
        reduction=made.reduction,
    )
    example = {**make_example(0), "jpg": drawn(500, 375)}
    with pytest.raises(UnsafeExampleError, match="the limit is 187,499"):
        view(example)
    with pytest.raises(BadExampleError, match="cannot be decoded") as raised:
        view({**example, "jpg": b"\xff\xd8\xff no picture"})
    assert raised.value.reason == "unreadable_image"
    with pytest.raises(BadExampleError, match="no member for image_key"):
        view({name: value for name, value in example.items() if name != "jpg"})


def test_other_formats_and_functions_of_the_user_see_the_whole_image() -> None:
    made = recipe(val(32), train(224), key="png;jpg")
    seen = []

    def size_of(example: Any) -> str:
        seen.append(example["jpg"].size)
        return "text"

    view = ScoreView(
        keys=("png;jpg", size_of),
        learner=(made.transform, tokenize),
        reference=(None, None),
        keep_image=True,
        reduction=made.reduction,
    )
    row = view({**make_example(0), "jpg": drawn(500, 375)})
    assert seen == [(500, 375)]
    assert row["image"].shape == (3, 32, 32) and row["raw_image"][0] == "jpg"
    png = make_example(0, size=300, image_format="png")
    image = decode(png, "png", shrink=made.reduction)
    assert not isinstance(image, Reduced) and image.size == (300, 300)


SHARDS = {"num_shards": 4, "examples_per_shard": 16, "size": 48}


def jest(shards: list[str], **options: Any) -> JESTDataset:
    defaults: dict[str, Any] = {
        "learner": TinyTwoTower(seed=1),
        "reference": TinyTwoTower(seed=2),
        "transform": val(8),
        "tokenizer": tokenize,
        "batch_size": 4,
        "super_batch_size": 16,
        "as_dict": True,
    }
    return JESTDataset(shards, **{**defaults, **options})


class Whole:
    """The same transform, unknown."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        made: Tensor = self.transform(image)
        return made


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("train_transform", [None, train(24)])
def test_uint8_super_batches_change_neither_choices_nor_batches(
    shards: list[str], num_workers: int, train_transform: Any
) -> None:
    known = jest(
        shards,
        num_workers=num_workers,
        train_transform=train_transform,
        reference_transform=v1.Compose([v1.Resize((8, 8)), v1.ToTensor()]),
        reduced_decoding=False,
    )
    unknown = jest(
        shards,
        transform=Whole(val(8)),
        reference_transform=Whole(v1.Compose([v1.Resize((8, 8)), v1.ToTensor()])),
        train_transform=None if train_transform is None else Whole(train_transform),
    )
    for found, expected in zip(islice(known, 4), islice(unknown, 4), strict=True):
        assert found["key"] == expected["key"]
        assert found["image"].dtype == torch.float32
        assert torch.equal(found["image"], expected["image"])


def test_super_batches_of_known_transforms_hold_uint8(shards: list[str]) -> None:
    dataset = jest(shards, train_transform=train(24), lookahead=1)
    next(iter(dataset))
    assert dataset._pipeline is not None
    columns = dataset._pipeline.run.in_flight[0].super_batch.columns
    assert columns["image"].dtype == torch.uint8 and "raw_image" in columns
    dataset = jest(shards, train_transform=train(8), lookahead=1)
    next(iter(dataset))
    assert dataset._pipeline is not None
    assert "raw_image" not in dataset._pipeline.run.in_flight[0].super_batch.columns


def test_the_score_views_pixels_are_what_the_train_transform_is_given(shards: list[str]) -> None:
    seen = []

    def view(image: Image.Image) -> Tensor:
        seen.append((image.mode, image.size))
        return v1.functional.to_tensor(image)

    dataset = jest(shards, train_transform=view, train_view_from="score_view", lookahead=0)
    batch = next(iter(dataset))
    assert seen == [("RGB", (8, 8))] * 4
    scored = next(iter(jest(shards, lookahead=0)))
    normalize = val(8).transforms[-1]
    assert torch.equal(normalize(batch["image"]), scored["image"])


def test_a_score_view_without_pixels_cannot_be_augmented_from(shards: list[str]) -> None:
    dataset = jest(
        shards, transform=to_tensor, train_transform=to_tensor, train_view_from="score_view"
    )
    with pytest.raises(ConfigError, match="needs a score view of uint8 pixels"):
        next(iter(dataset))


def test_repr_says_what_was_decided(shards: list[str]) -> None:
    assert "train view from the score view" in repr(jest(shards, train_transform=train(8)))
    shown = repr(jest(shards, train_transform=train(24)))
    assert "train view from encoded images | reduced decoding" in shown
    assert "train view" not in repr(jest(shards))
