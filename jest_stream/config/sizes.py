"""Turns the user's ratios into sizes of super-batches, batches and quotas: integers, made once.

b never changes within a run; B may, from given steps on. `Layout` tells the lanes of each rank.
Shapes: B: super-batch size, b: batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jest_stream.config.checks import as_integer, as_number
from jest_stream.config.selection import Quota, SelectionConfig
from jest_stream.errors import ConfigError

FilterRatio = float | Mapping[int, float]
"""The share of each super-batch that is discarded; or by first step: `{0: 0.5, 1000: 0.8}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The lanes of a run, dealt to its ranks in turn."""

    num_lanes: int
    rank: int
    world_size: int

    @property
    def lanes(self) -> list[int]:
        """The lanes of this rank."""
        return self.lanes_of(self.rank)

    def lanes_of(self, rank: int) -> list[int]:
        """Returns the lanes of any rank: r, r + W, r + 2 W, ..."""
        return list(range(rank, self.num_lanes, self.world_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the super-batches of a run. Made by `resolve_sizes`."""

    batch_size: int
    """b: examples that a step hands out."""
    changes: tuple[tuple[int, int], ...]
    """(step, B from this step on), in order, the first at step 0. Where B = b nothing is chosen."""
    stream_size: int
    """The size that the lanes divide: the largest super-batch asked for, also where uniform
    selection reads less. So the baseline reads the stream of the run that it is compared with."""

    @property
    def largest(self) -> int:
        """The largest super-batch that is read."""
        return max(size for _, size in self.changes)

    def at(self, step: int) -> int:
        """Returns the number of candidates that the sub-batch of `step` is chosen from."""
        return next(size for first, size in reversed(self.changes) if first <= step)

    def num_batches(self, num_examples: int, *, first_step: int) -> int:
        """Returns the number of sub-batches that one pass over the examples gives, from a step on.

        The last super-batch may be smaller than B; a rest below b makes no sub-batch. For example,
        100 examples at b = 10, B = 20 until step 3 and 30 from there: 20, 20, 20, 30 and the last
        10, so 5.
        """
        step = first_step
        while num_examples >= self.batch_size:
            # All super-batches of one size at once: a pass may have millions. At least one, for the
            # last may have fewer than `size` examples; `num_examples` is then below 0 and the loop
            # ends.
            size = self.at(step)
            count = max(1, num_examples // size)
            changes = [change for change, _ in self.changes if change > step]
            if changes:
                count = min(count, changes[0] - step)
            step += count
            num_examples -= count * size
        return step - first_step

    def __str__(self) -> str:
        sizes = ", then ".join(str(size) for _, size in self.changes)
        return f"{self.batch_size} of {sizes}"


def resolve_sizes(
    selection: SelectionConfig,
    batch_size: int,
    filter_ratio: FilterRatio,
    super_batch_size: int | None,
) -> Sizes:
    """Returns the integer sizes of a run; `super_batch_size` has precedence over the ratio.

    There are three cases in which B is b, since nothing is chosen: `method="uniform"`, unless
    `super_batch_size` is given; steps before `selection.start_step`; steps from `stop_step` on.

    Raises:
      ConfigError: for a ratio outside [0, 1), a super-batch smaller than a batch, or more floors
        than a batch has room for.
    """
    batch_size = as_integer("batch_size", batch_size, 1)
    quota_sizes(list((selection.quotas or {}).values()), batch_size)
    ratios = _checked(filter_ratio if isinstance(filter_ratio, Mapping) else {0: filter_ratio})
    if super_batch_size is None:
        # Rounded, and only here: int(256 / (1 - 0.95)) is 5119 in floating point, not 5120.
        wanted = {step: round(batch_size / (1 - ratio)) for step, ratio in ratios.items()}
    else:
        super_batch_size = as_integer("super_batch_size", super_batch_size, 1)
        if super_batch_size < batch_size:
            raise ConfigError(
                f"super_batch_size={super_batch_size} is below batch_size={batch_size}: a "
                f"sub-batch is chosen from a super-batch. Pass at least {batch_size}, or "
                f"filter_ratio instead."
            )
        wanted = {0: super_batch_size}
    stream_size = max(wanted.values())
    if selection.method == "uniform" and super_batch_size is None:
        wanted = {0: batch_size}
    return Sizes(
        batch_size=batch_size,
        changes=_between(wanted, selection.start_step, selection.stop_step, batch_size),
        stream_size=stream_size,
    )


def quota_sizes(quotas: Sequence[Quota], batch_size: int) -> tuple[list[int], list[int]]:
    """Returns the least and the most examples of each group in a batch of b.

    Floors are rounded up, caps down, and a share to either side. Where only rounding makes the
    floors more than b, those with the smallest remainders are rounded down instead: thirds of 100
    are 34, 33 and 33.

    Raises:
      ConfigError: if there are more groups with a floor than there is room for.
    """
    wanted = [round(quota.least * batch_size, 9) for quota in quotas]  # 0.07 * 100 is above 7
    allowed = [round(quota.most * batch_size, 9) for quota in quotas]
    # A share of 0.25 in a batch of 10 is 2.5: at least 2 and at most 3. The same number as a floor
    # is at least 3, as a cap at most 2.
    is_share = [quota.share is not None for quota in quotas]
    least = [math.floor(w) if s else math.ceil(w) for w, s in zip(wanted, is_share, strict=True)]
    most = [math.ceil(a) if s else math.floor(a) for a, s in zip(allowed, is_share, strict=True)]
    # Floors that were rounded up may be rounded down after all, but never to 0. Thirds of 100 are
    # [34, 34, 34] at first: 2 over, all of them can shrink, and the last two do.
    num_over = sum(least) - batch_size
    can_shrink = [group for group, size in enumerate(least) if size > max(1, wanted[group])]
    if num_over > len(can_shrink):
        raise ConfigError(
            f"the floors and shares of the quotas need at least {sum(least) - len(can_shrink)} "
            f"examples, since a group with a floor gets at least one, but batch_size={batch_size} "
            f"has no room for them. Pass a larger batch_size, or join small groups."
        )
    can_shrink.sort(key=lambda group: wanted[group] % 1, reverse=True)
    for group in can_shrink[len(can_shrink) - max(0, num_over) :]:
        least[group] -= 1
    # A floor and a cap of 0.25 in a batch of 10 would be at least 3 and at most 2: the floor wins.
    return least, list(map(max, most, least))


def _between(
    wanted: Mapping[int, int], start: int, stop: int | None, batch_size: int
) -> tuple[tuple[int, int], ...]:
    """Cuts the changes down to the steps at which examples are selected; at all others B = b.

    For example, {0: 20, 50: 40} from step 10 to 90 with b = 10 gives (0, 10), (10, 20), (50, 40),
    (90, 10).
    """
    at_start = next(size for step, size in sorted(wanted.items(), reverse=True) if step <= start)
    changes = {0: batch_size, start: at_start}
    changes |= {s: n for s, n in sorted(wanted.items()) if s > start and (stop is None or s < stop)}
    if stop is not None:
        changes[stop] = batch_size
    return tuple(sorted(changes.items()))


def _checked(ratios: Mapping[int, float]) -> Mapping[int, float]:
    if 0 not in ratios:
        raise ConfigError(
            f"filter_ratio must give the ratio from step 0 on, got {dict(ratios)}. Write for "
            f"example {{0: 0.5, 1000: 0.8}}."
        )
    checked = {}
    for step, value in ratios.items():
        ratio = as_number("filter_ratio", value)
        if not 0 <= ratio < 1:
            raise ConfigError(
                f"filter_ratio must be in [0, 1), got {ratio}: it is the share of each "
                f"super-batch that is discarded. The paper uses 0.5, 0.8 and 0.9."
            )
        checked[as_integer("a step of filter_ratio", step, 0)] = ratio
    return checked
