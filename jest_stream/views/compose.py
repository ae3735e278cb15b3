"""Splits known transforms in two: steps that make pixels, and steps that map each pixel alone.

A `Compose` of torchvision that ends in ToTensor, Normalize and the like is split there. The first
part gives uint8, which takes a quarter of the memory on its way to the device. The rest maps each
of the 256 values in the same way at every place, and is looked up in a table that the transform
itself filled. So the result is the transform's own, bit for bit, on every device. Steps are known
by type and module name: nothing is imported for it. Pure.

Shapes: n: images, C: channels, H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_stream.config import Transform
from jest_stream.views.decode import Reduced

_LIBRARIES = ("torchvision.transforms", "open_clip.transform", "timm.data")
_CONVERTING = frozenset("ToTensor PILToTensor ToImage MaybeToTensor MaybePILToTensor".split())
_PER_VALUE = _CONVERTING | frozenset("ConvertImageDtype ToDtype Normalize ToPureTensor".split())
_TO_RGB = frozenset("MaybeConvertMode _convert_to_rgb".split())
# Interpolations that average over the pixels they merge: an image may have been reduced before.
_SMOOTH = frozenset("bilinear bicubic lanczos box hamming".split())

# The decoder gives at least this many pixels for each one that the view keeps, in each direction.
# On 500 x 375 photographs of quality 90 a pixel then moves by 0.35 of 255 at 64 px (2.9 are left),
# by 0.57 at 96 px (1.95) and 0.72 at 112 px (1.67); with 1.46 left for 64 px it would be 1.33.
_MIN_RATIO = 1.6


@dataclass(frozen=True)
class Resize:
    """The step that resizes an image, in torchvision's terms."""

    size: tuple[int, ...]
    """Height and width, or the shorter side."""
    interpolation: str

    def target(self, full_size: tuple[int, int]) -> tuple[int, int]:
        """Returns width and height to which an image of `full_size` is resized."""
        # One number is the shorter side: with 64, an image of 500 x 375 becomes 85 x 64.
        if len(self.size) == 2:
            return self.size[1], self.size[0]
        width, height = full_size
        short, long = sorted(full_size)
        other = int(self.size[0] * long / short)
        return (self.size[0], other) if width <= height else (other, self.size[0])

    def apply(self, reduced: Reduced) -> Any:
        """Returns an image that was decoded reduced, resized to the target of its full size."""
        from PIL import Image

        resample = Image.Resampling[self.interpolation.upper()]
        target = self.target(reduced.full_size)
        return reduced.image.resize(target, resample=resample, box=reduced.box)


@dataclass(frozen=True)
class Reduction:
    """Says by how much images may be reduced while they are decoded; a `Shrink`."""

    resizes: tuple[Resize, ...]
    """The sizes that are made of each image."""

    def __call__(self, full_size: tuple[int, int]) -> int:
        """Returns the largest of 1, 2, 4 and 8 that leaves enough pixels for every view."""
        # 500 x 375 for a view of 85 x 64: a quarter leaves 93 rows, 1.46 for each of the 64, which
        # is below 1.6; a half leaves 187, so the factor is 2.
        targets = [resize.target(full_size) for resize in self.resizes]
        for factor in (8, 4, 2):
            if all(
                full >= factor * _MIN_RATIO * wanted
                for target in targets
                for full, wanted in zip(full_size, target, strict=True)
            ):
                return factor
        return 1


class PixelTable:
    """Applies the last steps of a transform by a table with an entry for each uint8 value.

    Args:
      steps: in order; each maps values one by one.
      takes_pictures: whether the first of them takes PIL images. If not, it takes tensors.
    """

    def __init__(self, steps: Sequence[Transform], *, takes_pictures: bool) -> None:
        self._steps = steps
        self._takes_pictures = takes_pictures
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns `[n, C, H, W]` pixels as the transform gives them; only uint8 is looked up."""
        # Images that the first steps could not leave as uint8 have been through all steps.
        if pixels.dtype != torch.uint8:
            return pixels
        table = self.table(pixels.shape[1], pixels.device)
        # One channel at a time: an index for all at once would take 4 bytes for each value.
        finished = table.new_empty(pixels.shape)
        for channel in range(pixels.shape[1]):
            values = table[channel].index_select(0, pixels[:, channel].reshape(-1).int())
            finished[:, channel] = values.view_as(pixels[:, channel])
        return finished

    def table(self, num_channels: int, device: torch.device) -> Tensor:
        """Returns `[C, 256]`: the result for each value in each channel."""
        place = (num_channels, device)
        if place not in self._tables:
            # An image of 1 x 256 pixels that holds every value once in each channel.
            values = torch.arange(256, dtype=torch.uint8).expand(num_channels, 1, 256).contiguous()
            probe: Any = as_picture(values) if self._takes_pictures else values
            made = _run(self._steps, probe).as_subclass(Tensor)
            self._tables[place] = made.reshape(num_channels, 256).to(device)
        return self._tables[place]


@dataclass(frozen=True)
class SplitCompose:
    """A known transform, split in two. Makes uint8 pixels where it can."""

    head: tuple[Transform, ...]
    """Steps that make pixels."""
    tail: tuple[Transform, ...] = ()
    """Steps that map their values one by one."""
    takes_pictures: bool = False
    """Whether the tail takes PIL images."""
    resize: Resize | None = field(default=None)
    """The first step that does anything to an RGB image, if it resizes with averaging."""
    num_before: int = 0
    """Steps that come before it."""

    def __call__(self, image: Any) -> Any:
        """Returns `[C, H, W]` uint8 for `pixel_table` where possible, else the finished image."""
        return self._pixels(_run(self.head, image))

    def of_reduced(self, reduced: Reduced) -> Any:
        """Returns the same for an image that was decoded reduced, resized by the same geometry."""
        assert self.resize is not None
        return self._pixels(_run(self.head[self.num_before + 1 :], self.resize.apply(reduced)))

    def pixel_table(self) -> PixelTable | None:
        """Returns the table of the last steps; None if there are none."""
        if not self.tail:
            return None
        return PixelTable(self.tail, takes_pictures=self.takes_pictures)

    def _pixels(self, value: Any) -> Any:
        # There are three cases: 1. a uint8 tensor, for a tail that takes tensors; 2. a PIL image,
        # for a tail that takes those; 3. anything else, which goes through the tail here.
        if isinstance(value, Tensor):
            is_known = value.dtype == torch.uint8 and value.dim() == 3 and len(value) in (1, 3)
            if is_known and not self.takes_pictures:
                return value.as_subclass(Tensor)
        elif getattr(value, "mode", None) in ("RGB", "L") and self.takes_pictures:
            array = np.array(value)  # a copy: PIL's own memory cannot be written to
            planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
            return torch.from_numpy(planes).contiguous()
        return _run(self.tail, value)


def split_compose(transform: Transform | None) -> SplitCompose | None:
    """Returns a `Compose` of torchvision split in two; None for anything else."""
    steps = _steps_of(transform)
    if steps is None:
        return None
    # From the end backwards: the first step that looks at more than single values ends the tail.
    start = len(steps)
    while start > 0 and _is_per_value(steps[start - 1]):
        start -= 1
    head, tail = tuple(steps[:start]), tuple(steps[start:])
    takes_pictures = any(_is(step, _CONVERTING) for step in tail)
    try:
        table = PixelTable(tail, takes_pictures=takes_pictures).table(3, torch.device("cpu"))
    except Exception:  # the user shall see the transform's own error, on a real image
        return None
    # The decoder makes RGB already, so that steps which convert to it do nothing.
    num_before = 0
    while num_before < len(head) and _is(head[num_before], _TO_RGB):
        num_before += 1
    resize = _resize_of(head[num_before]) if num_before < len(head) else None
    if table.dtype == torch.uint8:  # the transform gives uint8 itself: no table is needed
        return SplitCompose(tuple(steps), resize=resize, num_before=num_before)
    return SplitCompose(head, tail, takes_pictures, resize, num_before)


def as_picture(pixels: Tensor) -> Any:
    """Returns `[C, H, W]` uint8 as a PIL image, L or RGB."""
    from PIL import Image

    array = pixels.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1).copy())


def _run(steps: Sequence[Transform], value: Any) -> Any:
    for step in steps:
        value = step(value)
    return value


def _steps_of(transform: Any) -> list[Transform] | None:
    """Returns the steps of a `Compose`, those of inner ones included."""
    if not _is(transform, frozenset({"Compose"})):
        return None
    steps: list[Transform] = []
    for step in transform.transforms:
        inner = _steps_of(step)
        steps += [step] if inner is None else inner
    return steps


def _is(step: Any, names: frozenset[str]) -> bool:
    """Tells whether a step is of a known library, by one of these names."""
    kind = step if hasattr(step, "__qualname__") else type(step)  # a function, or an object
    module = str(getattr(kind, "__module__", ""))
    return getattr(kind, "__name__", "") in names and module.startswith(_LIBRARIES)


def _is_per_value(step: Any) -> bool:
    # A ToDtype may take a mapping from kinds of tensors to dtypes: values alone do not tell it.
    return _is(step, _PER_VALUE) and not isinstance(getattr(step, "dtype", None), Mapping)


def _resize_of(step: Any) -> Resize | None:
    if not _is(step, frozenset({"Resize"})) or getattr(step, "max_size", None) is not None:
        return None
    size = getattr(step, "size", None)
    sizes = (size,) if isinstance(size, int) else tuple(size or ())
    interpolation = getattr(step, "interpolation", None)
    interpolation = str(getattr(interpolation, "value", interpolation))
    # Nearest neighbour picks single pixels, which a reduced image no longer holds.
    if len(sizes) not in (1, 2) or interpolation not in _SMOOTH:
        return None
    return Resize(tuple(int(side) for side in sizes), interpolation)
