"""Defines `ScoringConfig`: how learner copy and reference embed candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jest_stream.config.checks import as_integer, as_number, as_optional_integer, set_field
from jest_stream.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """Settings for embedding candidates by learner copy and live reference. All can be combined."""

    autocast_dtype: torch.dtype | None = None
    """`torch.bfloat16` or `torch.float16` to score under autocast."""
    micro_batch_size: int = 256
    """Examples per forward pass: a larger one takes more memory and launches fewer kernels."""
    image_size: int | None = None
    """Pixels per side of the images that are scored. A larger score view is scaled down, and a
    vision transformer's position embeddings are resampled. None: the size of the score view."""
    patch_size: int | None = None
    """Pixels per side of a patch; larger patches make fewer tokens of the same view. The patch
    embedding is resampled from the learner's (FlexiViT, https://arxiv.org/abs/2212.08013). None:
    the model's own."""
    token_fraction: float = 1.0
    """Share of the image tokens that is kept, in (0, 1]: the same places of every image, evenly
    spread; class and register tokens stay."""

    def __post_init__(self) -> None:
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"scoring.autocast_dtype must be torch.bfloat16, torch.float16 or None, got "
                f"{self.autocast_dtype}"
            )
        micro_batch_size = as_integer("scoring.micro_batch_size", self.micro_batch_size, 1)
        set_field(self, "micro_batch_size", micro_batch_size)
        image_size = as_optional_integer("scoring.image_size", self.image_size, 1)
        set_field(self, "image_size", image_size)
        patch_size = as_optional_integer("scoring.patch_size", self.patch_size, 1)
        set_field(self, "patch_size", patch_size)
        fraction = as_number("scoring.token_fraction", self.token_fraction)
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"scoring.token_fraction must be in (0, 1], got {fraction}: it is the share of "
                f"image tokens that is kept. 1 keeps all."
            )
        set_field(self, "token_fraction", fraction)

    @property
    def changes_tokens(self) -> bool:
        """Tells whether an image becomes fewer tokens than an image of its size in training."""
        return self.patch_size is not None or self.token_fraction < 1
