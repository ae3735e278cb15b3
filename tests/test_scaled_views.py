"""Score views are scaled down as PIL would.

pytest tests/test_scaled_views.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jest_stream.errors import ConfigError
from jest_stream.views.scaling import scaled


def pictures(size: int) -> list[Image.Image]:
    """Noise, the hardest case, and hard edges."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    drawn = Image.new("RGB", (size, size), "white")
    drawn.paste((200, 30, 60), (size // 5, size // 4, size // 2, size * 3 // 4))
    return [Image.fromarray(noise), drawn]


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(("size", "side"), [(64, 32), (224, 112), (224, 96), (100, 37)])
def test_bicubic_is_pils_up_to_rounding_and_nearer_than_area(size: int, side: int) -> None:
    for picture in pictures(size):
        resized = tensor_of(picture.resize((side, side), Image.Resampling.BICUBIC)).float()
        image = tensor_of(picture)[None]
        exact = scaled(image, side)
        assert exact.dtype == torch.uint8 and exact.shape == (1, 3, side, side)
        # PIL rounds to bytes after each of its two passes, torch once.
        assert (exact[0].float() - resized).abs().max() <= 3
        assert (exact[0].float() - resized).abs().mean() < 0.2
        as_floats = scaled(image.float() / 255, side)[0].clamp(0, 1) * 255
        assert (as_floats - resized).abs().max() <= 3
        area = F.interpolate(image.float(), size=(side, side), mode="area")[0]
        distance = [(view - resized).abs().mean().item() for view in (as_floats, area)]
        assert distance[0] < distance[1] / 3


def test_images_of_the_size_are_taken_as_they_are() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert scaled(images, 8) is images
    assert scaled(images, None) is images
    named = {"pixel_values": images, "mask": torch.ones(2, 5)}
    assert scaled(named, 8)["pixel_values"] is images
    small = scaled(named, 4)
    assert small["pixel_values"].shape == (2, 3, 4, 4) and small["mask"] is named["mask"]


def test_many_images_are_scaled_a_part_at_a_time_to_the_same() -> None:
    images = torch.rand(600, 3, 8, 8).half()
    made = scaled(images, 4)
    assert made.dtype == torch.float16 and made.shape == (600, 3, 4, 4)
    torch.testing.assert_close(made[500:], scaled(images[500:], 4))


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"image_size=16, but the score view.*is 8 x 8 pixels; it"
    ):
        scaled(torch.rand(2, 3, 8, 8), 16)
    with pytest.raises(ConfigError, match="is 8 x 12 pixels; it must be square"):
        scaled(torch.rand(2, 3, 8, 12), 4)
    with pytest.raises(ConfigError, match=r"gives tensors of shape \[12\], no images"):
        scaled(torch.rand(2, 12), 4)
    with pytest.raises(ConfigError, match=r"gives no images, only \{'patches': \[9, 48\]\}"):
        scaled({"patches": torch.rand(2, 9, 48)}, 4)
