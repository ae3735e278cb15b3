"""What a `JESTDataset` was asked to do besides selecting and scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jest_stream.config.checks import as_integer, as_number, require_bool, require_one_of, set_field
from jest_stream.errors import ConfigError

OnBadExample = Literal["raise", "skip"]
OnBadShard = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The rest of what `JESTDataset` was asked to do; its docstring explains the fields."""

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
        integers = {"refresh_every": 1, "num_workers": 0, "seed": 0}
        for name, least in integers.items():
            set_field(self, name, as_integer(name, getattr(self, name), least))
        for name, least in {"lanes": 1, "steps_per_epoch": 1, "lookahead": 0}.items():
            if getattr(self, name) is not None:
                set_field(self, name, as_integer(name, getattr(self, name), least))
        require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        require_one_of("on_bad_shard", self.on_bad_shard, ("raise", "skip"))
        require_bool("repeat", self.repeat)
        if not 0 <= as_number("max_bad_fraction", self.max_bad_fraction) <= 1:
            raise ConfigError(
                f"max_bad_fraction must be a share in [0, 1], got {self.max_bad_fraction}"
            )
        if not as_number("timeout_s", self.timeout_s) > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, got {self.timeout_s}")
        flops = self.training_flops
        if flops is not None and not 0 < as_number("training_flops", flops) < math.inf:
            raise ConfigError(
                f"training_flops must be above 0, the FLOPs of a training step per example, or "
                f"None for an estimate, got {flops}"
            )
        if self.steps_per_epoch is not None and not self.repeat:
            raise ConfigError(
                f"steps_per_epoch={self.steps_per_epoch} promises that many batches, "
                f"repeat=False ends with the data. Pass one of the two."
            )

    @property
    def skips(self) -> bool:
        """Whether examples may be left out, so that their number is not known beforehand."""
        return "skip" in (self.on_bad_example, self.on_bad_shard)
