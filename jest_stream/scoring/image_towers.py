"""Changes each library's image tower to score at another size.

A model goes in, its towers come out (`known_towers`): the vision transformers of open_clip and
timm, and those of CLIP and SigLIP in transformers. They are known by the names of their classes;
none of these libraries is imported here. A tower is changed in place, so it should belong to a copy
of the model. New weights are left empty; `score_size` fills them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.scoring.resampling import Size
from jest_stream.scoring.tokens import KeepTokens, KeepTokensAndSay, kept_tokens

_OPEN_CLIP = ("open_clip.transformer.VisionTransformer",)
_TIMM = ("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva")
_TRANSFORMERS = (
    "transformers.models.clip.modeling_clip.CLIPVisionEmbeddings",
    "transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings",
)


@dataclass(frozen=True)
class Tower(ABC):
    """A vision transformer inside a model. Subclasses know the attributes of one library."""

    path: str
    """Name within the model."""
    module: Any

    patches: str = ""
    """Name of the convolution that embeds patches, within the tower."""
    positions: str = ""
    """Name of the position embedding, within the tower; empty if it has none."""
    num_prefix: int = 1
    """Rows of the position embedding before those of the grid."""
    needs: tuple[str, ...] = ()
    """Methods that resize the tower and that older versions of its library lack."""

    @property
    def image_size(self) -> Size:
        """Height and width that it was made for."""
        return _pair(self.module.image_size)

    @property
    def patch_size(self) -> Size:
        """Height and width of a patch."""
        return _pair(self.module.patch_size)

    @property
    def grid(self) -> Size:
        """Rows and columns of tokens."""
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return height // rows, width // columns

    @property
    def obstacle(self) -> str:
        """The reason why its tokens cannot be changed; empty if they can."""
        # 1. Only a convolution whose windows do not overlap can be resized by a `PatchMap`.
        conv = self.get(self.patches)
        if (
            not isinstance(conv, nn.Conv2d)
            or not conv.kernel_size == conv.stride == self.patch_size
        ):
            return "does not make its tokens by one convolution over patches"
        # 2. The library does the rest for some towers.
        if missing := [name for name in self.needs if not hasattr(self.module, name)]:
            return f"has no {missing[0]} in the installed version of its library (upgrade it)"
        # 3. A `PositionMap` takes the rows for a grid: 1 + 14 x 14 = 197 at 224 pixels, patch 16.
        if self.positions:
            rows = self.get(self.positions).shape[-2]
            grid = self.grid
            if rows != self.num_prefix + grid[0] * grid[1]:
                return f"has {rows} position embeddings, not one per patch of the image"
        return ""

    def get(self, name: str) -> Any:
        """Returns the attribute of a dotted name within the tower, None without one."""
        found = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        return found

    def full(self, name: str) -> str:
        """Returns a name within the tower as one within the model."""
        return f"{self.path}.{name}".strip(".")

    @abstractmethod
    def resize(self, image_size: Size, patch_size: Size) -> None:
        """Makes the tower one for images and patches of these sizes."""

    @abstractmethod
    def keep_tokens(self, fraction: float) -> None:
        """Makes the tower drop tokens before its first block."""


class OpenClipTower(Tower):
    """`open_clip.transformer.VisionTransformer`."""

    def resize(self, image_size: Size, patch_size: Size) -> None:
        """Makes the tower one for images and patches of these sizes."""
        module = self.module
        module.conv1 = _for_patches(module.conv1, patch_size)
        module.image_size, module.patch_size = image_size, patch_size
        module.grid_size = self.grid
        rows = self.num_prefix + self.grid[0] * self.grid[1]
        positions = module.positional_embedding
        module.positional_embedding = _like(positions, (rows, positions.shape[1]))

    def keep_tokens(self, fraction: float) -> None:
        """Makes the tower drop tokens before its first block."""
        # The place of the layer that drops random tokens in training: before the first block.
        self.module.patch_dropout = KeepTokens(kept_tokens(self.grid, fraction), self.num_prefix)


class TimmTower(Tower):
    """timm's `VisionTransformer` and `Eva`, which resize themselves, rotary embeddings included."""

    @property
    def image_size(self) -> Size:
        """Height and width that it was made for."""
        return _pair(self.module.patch_embed.img_size)

    @property
    def patch_size(self) -> Size:
        """Height and width of a patch."""
        return _pair(self.module.patch_embed.patch_size)

    def resize(self, image_size: Size, patch_size: Size) -> None:
        """Makes the tower one for images and patches of these sizes."""
        self.module.set_input_size(img_size=image_size, patch_size=patch_size)

    def keep_tokens(self, fraction: float) -> None:
        """Makes the tower drop tokens before its first block."""
        # Eva, whose rotary embeddings must know which tokens are left, asks for the indices.
        kind = KeepTokensAndSay if _is(self.module, _TIMM[1:]) else KeepTokens
        kept = kept_tokens(self.grid, fraction)
        self.module.patch_drop = kind(kept, self.module.num_prefix_tokens)


class TransformersTower(Tower):
    """The module that makes the tokens in CLIP and SigLIP of transformers.

    The blocks after it take any number of tokens, and are left alone.
    """

    def resize(self, image_size: Size, patch_size: Size) -> None:
        """Makes the tower one for images and patches of these sizes."""
        module = self.module
        module.patch_embedding = _for_patches(module.patch_embedding, patch_size)
        # transformers hold one number each; sizes that are not square are refused before.
        module.image_size, module.patch_size = image_size[0], patch_size[0]
        module.num_patches = self.grid[0] * self.grid[1]
        module.num_positions = self.num_prefix + module.num_patches
        weight = module.position_embedding.weight
        embedding = nn.Embedding(module.num_positions, weight.shape[1], device="meta")
        embedding.weight = _like(weight, embedding.weight.shape)
        module.position_embedding = embedding
        positions = torch.arange(module.num_positions, device=module.position_ids.device)
        module.position_ids = positions.expand((1, -1))

    def keep_tokens(self, fraction: float) -> None:
        """Makes the tower drop tokens before its first block."""
        keep = KeepTokens(kept_tokens(self.grid, fraction), self.num_prefix)
        self.module.register_forward_hook(keep.after)


def known_towers(model: nn.Module) -> Iterator[Tower]:
    """Yields every image tower in `model` that can be resized."""
    for path, module in model.named_modules():
        found: Any = module
        if _is(found, _OPEN_CLIP):
            yield OpenClipTower(path, found, "conv1", "positional_embedding")
        elif _is(found, _TIMM):
            yield TimmTower(
                path,
                found,
                "patch_embed.proj",
                "" if found.pos_embed is None else "pos_embed",
                num_prefix=0 if found.no_embed_class else found.num_prefix_tokens,
                needs=("set_input_size",),
            )
        elif _is(found, _TRANSFORMERS):
            yield TransformersTower(
                path,
                found,
                "patch_embedding",
                "position_embedding.weight",
                num_prefix=int(hasattr(found, "class_embedding")),
            )


def _is(module: nn.Module, classes: tuple[str, ...]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in classes for kind in type(module).__mro__)


def _pair(size: Any) -> Size:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _like(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def _for_patches(conv: nn.Conv2d, patch_size: Size) -> nn.Conv2d:
    """Returns `conv` for patches of another size, with its bias and an empty weight."""
    resized = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=patch_size,
        stride=patch_size,
        bias=conv.bias is not None,
        device="meta",
    )
    resized.weight = _like(conv.weight, resized.weight.shape)
    resized.bias = conv.bias
    return resized
