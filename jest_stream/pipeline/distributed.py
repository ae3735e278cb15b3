"""Gathers the states of all ranks into one: the only work that ranks do together.

Everything else is local to a rank. The collective runs on the CPU, in the caller's thread, in a
process group made for it with a time limit, and only where the user calls `gather_state_dict`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch.distributed

from jest_stream.config import as_number
from jest_stream.errors import ConfigError, StalledError
from jest_stream.pipeline.state import merge_states


class Resumable(Protocol):
    """An object with a state on each rank: a `JESTDataset`."""

    def state_dict(self, *, include_learner_copy: bool = False) -> dict[str, Any]:
        """Returns the state of this rank."""


def rank_and_world_size() -> tuple[int, int]:
    """Returns this process's place in the default process group; (0, 1) without one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_state_dict(
    dataset: Resumable, *, include_learner_copy: bool = False, timeout_s: float = 60.0
) -> dict[str, Any]:
    """Returns the state of all ranks in one, on every rank; any number of ranks can load it.

    A collective: every rank must call it, after the same step. It sends some kilobytes between
    CPUs over gloo, beside any backend of training. Without a process group it is `state_dict()`.

    Args:
      dataset: the `JESTDataset` of this rank.
      include_learner_copy: as in `state_dict`; each rank adds its own copy, which is not sent.
      timeout_s: longest wait for the other ranks. After an error the job should end, as after any
        collective that failed.

    Raises:
      StalledError: if not all ranks took part in time.
      ResumeMismatchError: if they are not at the same step of the same run.
    """
    if not as_number("timeout_s", timeout_s) > 0:
        raise ConfigError(f"timeout_s must be above 0 seconds, got {timeout_s}")
    state = dataset.state_dict(include_learner_copy=include_learner_copy)
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return merge_states([state])
    # The copy's weights are the same on every rank, and far too many to send over gloo.
    without_copy = {**state, "learner_copy": None}
    try:
        states = _all_gather(without_copy, world_size, timedelta(seconds=timeout_s))
    except RuntimeError as error:  # as gloo reports a time-out and a lost rank alike
        raise StalledError(
            f"gather_state_dict on rank {rank} of {world_size} got no answer from all ranks within "
            f"timeout_s={timeout_s:g} seconds ({error}). Every rank must call it, after the same "
            f"step; if they only are slow, raise timeout_s."
        ) from error
    return {**merge_states(states), "learner_copy": state["learner_copy"]}


def _all_gather(value: Any, world_size: int, timeout: timedelta) -> list[Any]:
    distributed = torch.distributed
    group = distributed.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, distributed.ProcessGroup)
    try:
        values: list[Any] = [None] * world_size
        distributed.all_gather_object(values, value, group=group)
        return values
    finally:
        distributed.destroy_process_group(group)
