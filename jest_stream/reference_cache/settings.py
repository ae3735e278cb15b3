"""Checks the settings of a build once: `ReferenceCache.build` makes them of its keywords.

They go down unchanged to all that takes part in a build: the header, the reader and the progress.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from jest_stream.config import (
    Key,
    Limits,
    OnBadExample,
    StorageConfig,
    Transform,
    as_device,
    as_integer,
    as_number,
    require_one_of,
)
from jest_stream.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """Settings of a build; `ReferenceCache` explains the fields.

    Raises:
      ConfigError: for values that cannot work, such as a device that this machine lacks.
    """

    transform: Transform | None
    tokenizer: Transform | None
    image_key: Key
    text_key: Key
    num_workers: int
    micro_batch_size: int
    autocast_dtype: torch.dtype | None
    device: torch.device | str | None
    storage: StorageConfig | None
    limits: Limits
    on_bad_example: OnBadExample
    max_bad_fraction: float
    part_size: int
    rank: int
    world_size: int
    timeout_s: float
    show_progress: bool

    def __post_init__(self) -> None:
        as_integer("num_workers", self.num_workers, 0)
        as_integer("micro_batch_size", self.micro_batch_size, 1)
        as_integer("part_size", self.part_size, 1)
        as_integer("rank", self.rank, 0)
        as_integer("world_size", self.world_size, 1)
        if self.rank >= self.world_size:
            raise ConfigError(f"rank must be below world_size={self.world_size}, got {self.rank}")
        require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        as_number("max_bad_fraction", self.max_bad_fraction)
        as_number("timeout_s", self.timeout_s)
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"autocast_dtype must be torch.bfloat16, torch.float16 or None, got "
                f"{self.autocast_dtype}"
            )
        _require_usable(self.device)


def share_of_work(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Returns this process's rank and the number of ranks: as given, else as torchrun set them."""
    if (rank is None) != (world_size is None):
        raise ConfigError(f"pass rank and world_size together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return rank, world_size


def _require_usable(device: torch.device | str | None) -> None:
    # A name may be well formed and yet mean a device that this machine or this torch lacks. An
    # empty tensor tells, before a model is loaded and the first shards are read.
    found = as_device("device", device)
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ConfigError(f"device={str(device)!r} cannot be used here: {error}") from error
