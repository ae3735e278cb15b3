"""How candidates are embedded for scoring, by learner copy and reference alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jest_stream.config.checks import as_integer, set_field
from jest_stream.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How the learner copy and a live reference embed the candidates; all of it can be combined."""

    autocast_dtype: torch.dtype | None = None
    """`torch.bfloat16` or `torch.float16` to score under autocast."""
    micro_batch_size: int = 256
    """Examples per forward pass: memory against launches."""

    def __post_init__(self) -> None:
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"scoring.autocast_dtype must be torch.bfloat16, torch.float16 or None, got "
                f"{self.autocast_dtype}"
            )
        size = as_integer("scoring.micro_batch_size", self.micro_batch_size, 1)
        set_field(self, "micro_batch_size", size)


def require_scoring(scoring: object) -> ScoringConfig:
    """Returns `scoring`, or raises `ConfigError` if it is no `ScoringConfig`."""
    if isinstance(scoring, ScoringConfig):
        return scoring
    raise ConfigError(
        f"scoring must be a ScoringConfig, got {scoring!r}. Write for example "
        f"ScoringConfig(autocast_dtype=torch.bfloat16)."
    )
