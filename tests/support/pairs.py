"""A source in memory, as users write them, feeds the tests of the middle of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jest_stream.config import Layout, Sizes, StreamConfig
from jest_stream.errors import BadExampleError
from jest_stream.types import Example


class Pairs:
    """Shards of ready pairs, keyed `SHARD-NUMBER`; `num_examples` says how many, and may lie."""

    def __init__(self, lengths: list[int], num_examples: Any = "lengths") -> None:
        self._lengths = lengths
        self.num_examples = lengths if num_examples == "lengths" else num_examples
        self.num_shards = len(lengths)
        self.fingerprint = f"pairs {lengths}"

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        for number in range(index, self._lengths[shard]):
            image = torch.full((3, 8, 8), shard + 1.0)
            key = f"{shard}-{number}"
            yield {"__key__": key, "image": image, "text": torch.full((4,), number)}, 0


def key_of(example: Example) -> dict[str, Any]:
    """Prepares a row that no model looks at."""
    return {"key": example["__key__"], "shard": "", "image": example["image"], "text": 0}


def stream_config(**options: Any) -> StreamConfig:
    """How to read, by default endlessly, in this process, one super-batch ahead."""
    usual: dict[str, Any] = {
        "refresh_every": 1,
        "lookahead": 1,
        "steps_per_epoch": None,
        "repeat": True,
        "seed": 0,
        "num_workers": 0,
        "lanes": None,
        "on_bad_example": "raise",
        "on_bad_shard": "raise",
        "max_bad_fraction": 0.01,
        "timeout_s": 10.0,
        "training_flops": None,
    }
    return StreamConfig(**{**usual, **options})


def sizes_of(batch_size: int, super_batch_size: int) -> Sizes:
    """The same sizes at every step."""
    return Sizes(
        batch_size=batch_size, changes=((0, super_batch_size),), stream_size=super_batch_size
    )


def alone(num_lanes: int) -> Layout:
    """One rank that reads all lanes."""
    return Layout(num_lanes=num_lanes, rank=0, world_size=1)
