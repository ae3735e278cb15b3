"""The settings, frozen and checked once.

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
    start_step: int = 0
    """First step whose batch is selected; those before are uniform and score nothing."""
    stop_step: int | None = None
    """First step whose batch is uniform again. None: selection never stops."""
    micro_batch_size: int = 256
    """Examples per forward pass when scoring: memory against launches."""
    autocast_dtype: torch.dtype | None = None
    """`torch.bfloat16` or `torch.float16` to score under autocast."""

    def __post_init__(self) -> None:
        _require_one_of("selection.method", self.method, ("joint", "independent", "uniform"))
        _require_one_of("selection.loss", self.loss, ("auto", "sigmoid", "softmax"))
        if not callable(self.score):
            _require_one_of("selection.score", self.score, _SCORES, "or a function of two tiles")
        require_at_least("selection.num_chunks", self.num_chunks, 1)
        require_at_least("selection.start_step", self.start_step, 0)
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ConfigError(
                f"selection.stop_step={self.stop_step} is not after "
                f"start_step={self.start_step}, so nothing would ever be selected. Use "
                f"method='uniform' for that."
            )
        require_at_least("selection.micro_batch_size", self.micro_batch_size, 1)
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
    """The rest of what `JESTDataset` was asked to do; its docstring explains the fields."""

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
        require_at_least("refresh_every", self.refresh_every, 1)
        require_at_least("lookahead", self.lookahead, 0)
        require_at_least("num_workers", self.num_workers, 0)
        require_at_least("seed", self.seed, 0)
        _require_one_of("on_bad_example", self.on_bad_example, ("raise", "skip"))
        if self.lanes is not None:
            require_at_least("lanes", self.lanes, 1)
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, got {self.timeout_s}")
        if self.steps_per_epoch is not None:
            require_at_least("steps_per_epoch", self.steps_per_epoch, 1)
            if not self.repeat:
                raise ConfigError(
                    f"steps_per_epoch={self.steps_per_epoch} promises that many batches, "
                    f"repeat=False ends with the data. Pass one of the two."
                )


def require_at_least(name: str, value: object, least: int) -> None:
    """Raises `ConfigError` unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...], more: str = "") -> None:
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ConfigError(f"{name} must be one of {names} {more}".rstrip() + f", got {value!r}")
