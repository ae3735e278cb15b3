"""Gathers all settings of one run, as `JESTDataset` makes them of its arguments.

`RunSettings` holds the configs that users make themselves (selection, scoring, storage) and those
that gather single arguments: `ViewConfig`, and here `StreamConfig` and `BatchConfig`. Each config
is checked once, when it is made; later code relies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from jest_stream.config.checks import (
    as_finite,
    as_integer,
    as_number,
    as_optional_integer,
    require_bool,
    require_one_of,
    require_share,
    set_field,
)
from jest_stream.config.scoring import ScoringConfig
from jest_stream.config.selection import SelectionConfig
from jest_stream.config.sizes import Sizes
from jest_stream.config.storage import StorageConfig
from jest_stream.config.views import ViewConfig
from jest_stream.errors import ConfigError

OnBadExample = Literal["raise", "skip"]
OnBadShard = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """Settings for reading the stream and scoring it ahead. `JESTDataset` explains the fields."""

    refresh_every: int
    lookahead: int | None
    steps_per_epoch: int | None
    repeat: bool
    seed: int
    num_workers: int
    lanes: int | None
    on_bad_example: OnBadExample
    on_bad_shard: OnBadShard
    max_bad_fraction: float
    timeout_s: float
    training_flops: float | None

    def __post_init__(self) -> None:
        set_field(self, "refresh_every", as_integer("refresh_every", self.refresh_every, 1))
        set_field(self, "lookahead", as_optional_integer("lookahead", self.lookahead, 0))
        steps_per_epoch = as_optional_integer("steps_per_epoch", self.steps_per_epoch, 1)
        set_field(self, "steps_per_epoch", steps_per_epoch)
        set_field(self, "seed", as_integer("seed", self.seed, 0))
        set_field(self, "num_workers", as_integer("num_workers", self.num_workers, 0))
        set_field(self, "lanes", as_optional_integer("lanes", self.lanes, 1))
        require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        require_one_of("on_bad_shard", self.on_bad_shard, ("raise", "skip"))
        require_bool("repeat", self.repeat)
        require_share("max_bad_fraction", self.max_bad_fraction)
        # `not x > 0` refuses NaN too, which `x <= 0` would let pass. Infinity is a valid time-out.
        if not as_number("timeout_s", self.timeout_s) > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, got {self.timeout_s}")
        flops = self.training_flops
        if flops is not None and not 0 < as_number("training_flops", flops) < math.inf:
            raise ConfigError(
                f"training_flops must be above 0, the FLOPs of a training step per example, or "
                f"None for an estimate, got {flops}"
            )
        # Both would end an epoch, and the data may be shorter than the number of batches promised.
        if self.steps_per_epoch is not None and not self.repeat:
            raise ConfigError(
                f"steps_per_epoch={self.steps_per_epoch} promises that many batches, "
                f"repeat=False ends with the data. Pass one of the two."
            )

    @property
    def skips(self) -> bool:
        """Tells whether examples may be left out, which makes their number unknown beforehand."""
        return "skip" in (self.on_bad_example, self.on_bad_shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The form of the batches that the loop gets. `JESTDataset` explains the fields."""

    as_dict: bool
    with_reference: bool
    score_view_fraction: float

    def __post_init__(self) -> None:
        require_bool("as_dict", self.as_dict)
        require_bool("with_reference", self.with_reference)
        if self.with_reference and not self.as_dict:
            raise ConfigError(
                "with_reference=True adds an entry to the batch, but as_dict=False yields a pair "
                "(images, texts). Pass as_dict=True."
            )
        # `TwoSizes` checks the bounds of the share, which depend on the batch size.
        share = as_finite("score_view_fraction", self.score_view_fraction)
        set_field(self, "score_view_fraction", share)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """All settings of a run. The source and the models are no settings: see `open_inputs`."""

    selection: SelectionConfig
    sizes: Sizes
    stream: StreamConfig
    scoring: ScoringConfig
    device: torch.device | None
    """Where batches lie. None: where the learner is when reading begins."""
    scoring_device: torch.device | None
    """Where learner copy and reference run. None: where batches lie."""
    batch: BatchConfig
    views: ViewConfig
    storage: StorageConfig | None
