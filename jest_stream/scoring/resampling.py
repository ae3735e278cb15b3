"""Resamples a vision transformer's weights to another size, by linear maps.

A map is one matrix, made once; applying it is one product, on the device, and differentiable. The
learner copy is refreshed through it, and a training step at the score size reaches the learner's
own weights. Maps start from the weights as trained: resizing twice is not resizing once.

Shapes: T: rows of the position embedding, W: width, C: channels, p: patch side.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width: of an image or a patch in pixels, of a grid in tokens."""


class PositionMap:
    """Position embeddings of one grid at another: bicubic and antialiased, as open_clip and timm
    resize them. Rows before the grid's (class token, registers) stay as they are."""

    def __init__(self, old_grid: Size, new_grid: Size, num_prefix: int) -> None:
        from timm.layers.pos_embed import resample_abs_pos_embed

        num_rows = num_prefix + old_grid[0] * old_grid[1]
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            # Resampling is linear: the results of all unit vectors are the columns of its matrix.
            resampled = resample_abs_pos_embed(
                torch.eye(num_rows)[None],
                new_size=list(new_grid),
                old_size=list(old_grid),
                num_prefix_tokens=num_prefix,
            )
        self._matrix = _Matrix(resampled[0])  # [T', T]

    def __call__(self, positions: Tensor) -> Tensor:
        """Returns `[..., T', W]` of `[..., T, W]`."""
        resampled = self._matrix.on(positions.device, positions.float(), is_left=True)
        return resampled.to(positions.dtype)


class PatchMap:
    """A patch embedding's weights for larger patches: FlexiViT's pseudo-inverse resize.

    A patch that was scaled up gives the same token as before (https://arxiv.org/abs/2212.08013).
    """

    def __init__(self, old_patch: Size, new_patch: Size) -> None:
        from timm.layers.patch_embed import resample_patch_embed

        num_pixels = old_patch[0] * old_patch[1]
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            units = torch.eye(num_pixels).reshape(num_pixels, 1, *old_patch)
            resampled = resample_patch_embed(units, new_size=list(new_patch))
        self._new_patch = new_patch
        self._matrix = _Matrix(resampled.reshape(num_pixels, -1))  # [p p, p' p']

    def __call__(self, weight: Tensor) -> Tensor:
        """Returns `[W, C, p', p']` of `[W, C, p, p]`."""
        flat = weight.float().flatten(2)
        resampled = self._matrix.on(weight.device, flat, is_left=False)
        return resampled.reshape(*weight.shape[:2], *self._new_patch).to(weight.dtype)


Resampling = PositionMap | PatchMap


class _Matrix:
    """One matrix in float32, on the device where it was last used."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.contiguous()

    def on(self, device: torch.device, operand: Tensor, *, is_left: bool) -> Tensor:
        """Returns the product with `operand`, in float32 also under the caller's autocast."""
        if self._values.device != device:
            with torch.inference_mode(False):
                self._values = self._values.to(device)
        has_autocast = torch.amp.is_autocast_available(device.type)  # the meta device has none
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            return self._values @ operand if is_left else operand @ self._values
