"""The settings, frozen and checked once. Ratios that the user gives become integers here.

`SelectionConfig` says how sub-batches are chosen and is public; `StreamConfig` is the rest of what
`JESTDataset` was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jest_stream.errors import ConfigError

Method = Literal["joint", "independent", "uniform"]
Loss = Literal["auto", "sigmoid", "softmax"]
OnBadExample = Literal["raise", "skip"]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""Score of each pair of a tile, from the learner's and the reference's pair losses."""

_SCORES = ("learnability", "easy_reference", "hard_learner")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How a sub-batch is chosen from a super-batch."""

    method: Method = "joint"
    """`joint` is JEST; `independent` scores each example alone; `uniform` skips scoring: the
    baseline that reads the same stream."""
    score: str | ScoreFunction = "learnability"
    """`learnability` (learner loss - reference loss), `easy_reference` (minus reference loss, no
    learner pass), `hard_learner` (learner loss, no reference), or a function of the two tiles of
    pair losses."""
    num_chunks: int = 16
    """Sequential draws, each conditioned on those before; never more than the batch has examples.
    16 is the paper's default, 1 is independent selection."""
    gain: float = 1.0
    """Factor on the scores before sampling. Larger is greedier."""
    loss: Loss = "auto"
    """Family of the pair losses. `auto`: sigmoid when the model has a bias, softmax otherwise."""
    micro_batch_size: int = 256
    """Examples per forward pass when scoring: memory against launches."""
    autocast_dtype: torch.dtype | None = None
    """`torch.bfloat16` or `torch.float16` to score under autocast."""

    def __post_init__(self) -> None:
        _require_one_of("selection.method", self.method, ("joint", "independent", "uniform"))
        _require_one_of("selection.loss", self.loss, ("auto", "sigmoid", "softmax"))
        if not callable(self.score):
            _require_one_of("selection.score", self.score, _SCORES, "or a function of two tiles")
        _require_at_least("selection.num_chunks", self.num_chunks, 1)
        _require_at_least("selection.micro_batch_size", self.micro_batch_size, 1)
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"selection.autocast_dtype must be torch.bfloat16, torch.float16 or None, got "
                f"{self.autocast_dtype}"
            )
        if not self.gain > 0:
            raise ConfigError(
                f"selection.gain must be above 0, got {self.gain}. Use method='uniform' for a "
                f"choice that ignores the scores."
            )


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What `JESTDataset` was asked to do, with sizes as integers that nothing computes again."""

    batch_size: int
    super_batch_size: int
    """Candidates per step; `batch_size` of them where nothing is chosen."""
    stream_size: int
    """What the lanes divide: the super-batch that was asked for, also where uniform selection reads
    less per step. So the baseline reads the stream of the run that it is compared with."""
    refresh_every: int
    lookahead: int
    steps_per_epoch: int | None
    repeat: bool
    seed: int
    num_workers: int
    lanes: int | None
    on_bad_example: OnBadExample
    timeout_s: float

    def __post_init__(self) -> None:
        _require_at_least("refresh_every", self.refresh_every, 1)
        _require_at_least("lookahead", self.lookahead, 0)
        _require_at_least("num_workers", self.num_workers, 0)
        _require_at_least("seed", self.seed, 0)
        _require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        if self.lanes is not None:
            _require_at_least("lanes", self.lanes, 1)
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, got {self.timeout_s}")
        if self.steps_per_epoch is not None:
            _require_at_least("steps_per_epoch", self.steps_per_epoch, 1)
            if not self.repeat:
                raise ConfigError(
                    f"steps_per_epoch={self.steps_per_epoch} promises that many batches, "
                    f"repeat=False ends with the data. Pass one of the two."
                )


def resolve_super_batch_size(
    batch_size: int, filter_ratio: float, super_batch_size: int | None
) -> int:
    """Returns how many candidates a sub-batch is chosen from; `super_batch_size` has precedence.

    Raises:
      ConfigError: unless 0 <= filter_ratio < 1 and the super-batch holds a batch.
    """
    _require_at_least("batch_size", batch_size, 1)
    if not 0 <= filter_ratio < 1:
        raise ConfigError(
            f"filter_ratio must be in [0, 1), got {filter_ratio}: it is the share of each "
            f"super-batch that is discarded. The paper uses 0.5, 0.8 and 0.9."
        )
    if super_batch_size is None:
        # Rounded, and only here: int(256 / (1 - 0.95)) is 5119 in floating point.
        return round(batch_size / (1 - filter_ratio))
    _require_at_least("super_batch_size", super_batch_size, 1)
    if super_batch_size < batch_size:
        raise ConfigError(
            f"super_batch_size={super_batch_size} is below batch_size={batch_size}: a sub-batch is "
            f"chosen from a super-batch. Pass at least {batch_size}, or filter_ratio instead."
        )
    return super_batch_size


def _require_at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...], more: str = "") -> None:
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ConfigError(f"{name} must be one of {names} {more}".rstrip() + f", got {value!r}")
