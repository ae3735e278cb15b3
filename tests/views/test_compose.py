"""Known transforms are split in two and give the same image together, bit for bit.

pytest tests/views/test_compose.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from support.leaks import no_leaks  # noqa: F401
from timm.data import create_transform
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from jest_stream.randomness import isolated_rng
from jest_stream.views.compose import Resize, SplitCompose, split_compose

pytestmark = pytest.mark.usefixtures("no_leaks")

MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    """Returns noise that holds every value in every channel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def preprocess_val() -> Any:
    return open_clip.create_model_and_transforms("RN50", load_weights=False)[2]


KNOWN: dict[str, Callable[[], Any]] = {
    "open_clip": preprocess_val,
    "open_clip squash": lambda: image_transform(64, is_train=False, resize_mode="squash"),
    "open_clip longest": lambda: image_transform(64, is_train=False, resize_mode="longest"),
    "open_clip wide": lambda: image_transform((48, 64), is_train=False),
    "open_clip train": lambda: image_transform(64, is_train=True),
    "timm": lambda: create_transform(64),
    "timm train": lambda: create_transform(64, is_training=True, re_prob=0.0),
    "v1": lambda: v1.Compose([v1.Resize(32), v1.CenterCrop(32), v1.ToTensor()]),
    "v1 uint8": lambda: v1.Compose(
        [
            v1.Resize(32),
            v1.CenterCrop(32),
            v1.PILToTensor(),
            v1.ConvertImageDtype(torch.float16),
        ]
    ),
    "v1 in place": lambda: v1.Compose(
        [v1.Resize(32), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(MEAN, STD, inplace=True)]
    ),
    "v1 nested": lambda: v1.Compose(
        [
            v1.Compose([v1.Resize(32), v1.CenterCrop(32)]),
            v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]),
        ]
    ),
    "v1 grey": lambda: v1.Compose(
        [v1.Grayscale(), v1.Resize((32, 40)), v1.ToTensor(), v1.Normalize([0.5], [0.5])]
    ),
    "v2 pictures": lambda: v2.Compose(
        [
            v2.Resize(32),
            v2.CenterCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    ),
    "v2 tensors": lambda: v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(32, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    ),
    "v2 unscaled": lambda: v2.Compose(
        [v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32)]
    ),
}


def both(transform: Any, image: Image.Image) -> tuple[Any, Any, SplitCompose]:
    """Returns the image of the transform, that of its two parts together, and the parts."""
    parts = split_compose(transform)
    assert parts is not None
    with isolated_rng("same"):
        whole = transform(image)
    with isolated_rng("same"):
        pixels = parts(image)
    return whole, pixels, parts


@pytest.mark.parametrize("name", KNOWN)
def test_the_parts_give_what_the_whole_gives_bit_for_bit(name: str) -> None:
    transform = KNOWN[name]()
    images = [picture(*size, seed=i) for i, size in enumerate([(90, 70), (70, 90), (400, 300)])]
    made = [both(transform, image) for image in images]
    pixels = torch.stack([pixels for _, pixels, _ in made])
    assert pixels.dtype == torch.uint8 and type(pixels) is torch.Tensor
    finish = made[0][2].pixel_table()
    assert finish is not None
    finished = finish(pixels)
    expected = torch.stack([torch.as_tensor(whole) for whole, _, _ in made])
    assert finished.dtype == expected.dtype
    assert torch.equal(finished, expected)


def test_every_value_of_every_channel_is_looked_up_alike() -> None:
    finish = split_compose(image_transform(64, is_train=False)).pixel_table()  # type: ignore[union-attr]
    assert finish is not None
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    normalize = v1.Normalize(*_statistics())
    assert torch.equal(finish(values), normalize(values.float().div(255)))
    ready = torch.rand(2, 3, 4, 4)
    assert finish(ready) is ready


def _statistics() -> tuple[Any, Any]:
    return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def own(image: Any) -> Any:
    return v1.functional.to_tensor(image)


class Compose(v1.Compose):
    """Of the user's own: does whatever it likes."""


@pytest.mark.parametrize(
    "transform",
    [
        own,
        None,
        v1.ToTensor(),
        Compose([v1.ToTensor()]),
        v1.Compose([v1.Resize(32), v1.Normalize([0.5], [0.5])]),  # raises on every picture
    ],
    ids=["function", "none", "single", "subclass", "impossible"],
)
def test_anything_else_stays_as_it_is(transform: Any) -> None:
    assert split_compose(transform) is None


@pytest.mark.parametrize(
    "steps",
    [
        [v1.Resize((32, 32)), v1.ToTensor(), v1.RandomErasing(p=1.0)],
        [v1.Resize((32, 32)), v1.ToTensor(), v1.Lambda(lambda image: image * 2)],
        [v1.ToTensor(), v1.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)],
        [v1.ToTensor(), v1.Resize((32, 32)), v1.Normalize(MEAN, STD)],
    ],
    ids=["erased", "own end", "floats before", "normalized floats"],
)
def test_what_cannot_be_split_gives_what_it_always_gave(steps: list[Any]) -> None:
    transform = v1.Compose(steps)
    with isolated_rng("same"):
        whole = transform(picture())
    with isolated_rng("same"):
        made = (split_compose(transform) or transform)(picture())
    assert made.dtype == torch.float32
    assert torch.equal(made, whole)


def test_a_dtype_by_kind_of_tensor_is_left_to_the_transform() -> None:
    """An Image is not a plain Tensor: the first one stays as it is, the second one is converted."""
    for kind, dtype in [(torch.Tensor, torch.uint8), (tv_tensors.Image, torch.float32)]:
        to_float = v2.ToDtype({kind: torch.float32, "others": None})
        transform = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), to_float])
        whole, made, parts = both(transform, picture())
        assert whole.dtype == dtype and parts.pixel_table() is None
        assert torch.equal(made, whole)


def test_a_transform_that_gives_pixels_needs_no_end() -> None:
    transform = v1.Compose([v1.Resize(32), v1.CenterCrop(32), v1.PILToTensor()])
    whole, pixels, parts = both(transform, picture())
    assert parts.pixel_table() is None
    assert torch.equal(pixels, whole)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (501, 333), (64, 64), (1000, 70)])
@pytest.mark.parametrize("wanted", [(32,), (24, 40)])
def test_targets_are_those_of_torchvision(size: tuple[int, int], wanted: tuple[int, ...]) -> None:
    given = wanted[0] if len(wanted) == 1 else wanted
    found = Resize(wanted, "bilinear").target(size)
    assert found == v1.Resize(given)(Image.new("RGB", size)).size


@pytest.mark.parametrize(
    ("step", "is_known"),
    [
        (v1.Resize(32), True),
        (v1.Resize(32, InterpolationMode.BICUBIC), True),
        (v2.Resize((32, 40)), True),
        (v1.Resize(32, InterpolationMode.NEAREST), False),
        (v1.Resize(32, max_size=40), False),
        (v1.RandomResizedCrop(32), False),
        (v1.CenterCrop(32), False),
        (v2.ToImage(), False),
    ],
)
def test_a_resize_is_known_where_images_may_be_reduced_before_it(step: Any, is_known: bool) -> None:
    parts = split_compose(v1.Compose([step, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    assert parts is not None
    assert (parts.resize is not None) == is_known
