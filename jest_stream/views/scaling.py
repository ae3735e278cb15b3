"""Makes score views smaller, on the device where they lie. Pure functions.

Shapes: n: images, C: channels, H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from jest_stream.errors import ConfigError

_ROWS = 256  # images in float at a time: super-batches are held as they came
_View = TypeVar("_View", Tensor, dict[str, Tensor], "Tensor | Mapping[str, Tensor]")


def scaled(view: _View, side: int | None) -> _View:
    """Returns images of `side` x `side` pixels; None, and images of that size, as they are.

    Bicubic and antialiased, which equals PIL's BICUBIC up to its rounding: the transforms of CLIP
    and SigLIP use that. An area mean, the other way not to alias, is several times as far from it.
    Of named tensors, those with four dimensions are images.

    Args:
      view: `[n, C, H, W]`, floating or integers from 0 to 255; or named tensors.
      side: pixels.

    Raises:
      ConfigError: for images that are smaller, or not square, or where there are none.
    """
    if side is None:
        return view
    if isinstance(view, Tensor):
        return _scaled(view, side)
    if not any(tensor.ndim == 4 for tensor in view.values()):
        shapes = {name: list(tensor.shape[1:]) for name, tensor in view.items()}
        raise ConfigError(
            f"scoring.image_size={side}, but transform gives no images, only {shapes}. Leave "
            f"scoring.image_size at None, and let transform give the size that is scored."
        )
    return {
        name: _scaled(tensor, side) if tensor.ndim == 4 else tensor for name, tensor in view.items()
    }


def _scaled(images: Tensor, side: int) -> Tensor:
    if images.ndim != 4:
        raise ConfigError(
            f"scoring.image_size={side}, but transform gives tensors of shape "
            f"{list(images.shape[1:])}, no images. Leave scoring.image_size at None, or let "
            f"transform give [channels, height, width]."
        )
    height, width = images.shape[2:]
    if height == width == side:
        return images
    if height != width or height < side:
        raise ConfigError(
            f"scoring.image_size={side}, but the score view that transform gives is {height} x "
            f"{width} pixels; it must be square and at least as large. Let transform give "
            f"{side} x {side} pixels, or more."
        )
    starts = range(0, len(images), _ROWS)
    return torch.cat([_bicubic(images[start : start + _ROWS], side) for start in starts])


def _bicubic(images: Tensor, side: int) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        made = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True)
    # Bicubic weights may be negative: at sharp edges results leave the range 0 to 255.
    if images.is_floating_point():
        return made.to(images.dtype)
    return made.round().clamp(0, 255).to(images.dtype)
