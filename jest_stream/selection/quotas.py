"""Floors, caps and shares of groups, kept within the loop over chunks.

In: the group of every candidate, and quotas. Labels are known on the host, so that all numbers are
worked out there, before the first draw (`plan_bounds`): how many of each group must and may have
been drawn after each draw. `Bounds` then holds the draws to them on the device, where the counts
are: which group the free places go to is decided by the scores. A draw that is put back and made
again need keep only to the bounds of the whole.

G: groups with a quota; one more, the last, holds all other candidates. B: candidates, S: draws.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from jest_stream.config import Quota, quota_sizes, require_quotas
from jest_stream.errors import ConfigError


@dataclass(frozen=True)
class Groups:
    """Which group each candidate is of, and how much of the sub-batch a group may make up."""

    labels: Sequence[Hashable] | Tensor
    """Of the B candidates: any values, or a `[B]` int64 tensor on the CPU."""
    quotas: Mapping[Hashable, Quota]
    """By label. Candidates with other labels are bound by nothing."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` if the floors leave no room, or the labels are no column."""
        require_quotas(self.quotas)
        if isinstance(self.labels, Tensor):
            is_column = self.labels.dim() == 1 and not self.labels.is_floating_point()
            if not is_column or self.labels.device.type != "cpu":
                raise ConfigError(
                    f"labels must be [B] integers on the CPU, where it is decided how many of each "
                    f"group are drawn; got {list(self.labels.shape)} {self.labels.dtype} on "
                    f"{self.labels.device}."
                )

    def members(self) -> list[int]:
        """Returns the group of each candidate: which quota, in their order; G without one."""
        labels = self.labels.tolist() if isinstance(self.labels, Tensor) else self.labels
        number = {group: index for index, group in enumerate(self.quotas)}
        return [number.get(label, len(number)) for label in labels]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many of each group a sub-batch holds. Each list of groups is G + 1 long."""

    asked: tuple[list[int], list[int]]
    """The least and the most that the quotas ask for in the whole sub-batch."""
    least: list[list[int]]
    """After each of the S draws: how many must have been drawn so far."""
    most: list[list[int]]
    """After each of the S draws: how many may have been drawn so far."""


def plan_bounds(quotas: Sequence[Quota], available: Sequence[int], sizes: Sequence[int]) -> Plan:
    """Returns bounds that can be kept in every draw, as close to the quotas as there are examples.

    Args:
      quotas: of the G groups.
      available: candidates of each of the G + 1 groups.
      sizes: examples per draw; they add up to at most the number of candidates.

    Raises:
      ConfigError: if the floors need more examples than a sub-batch has.
    """
    batch_size = sum(sizes)
    least, most = quota_sizes(quotas, batch_size)
    least, most = [*least, 0], [*most, batch_size]
    attainable = [min(pair) for pair in zip(least, available, strict=True)]
    widened = _widened(most, available, [*(quota.most for quota in quotas), 1.0], batch_size)
    paced = _paced(attainable, sizes)
    # Rounded up, so that there is room for each draw; where a floor is ahead, with the floor.
    paced_most = [
        [max(low, -(-high * end // batch_size)) for low, high in zip(row, widened, strict=True)]
        for end, row in zip(accumulate(sizes), paced, strict=True)
    ]
    return Plan(asked=(least, most), least=paced, most=paced_most)


def _widened(
    most: Sequence[int], available: Sequence[int], shares: Sequence[float], batch_size: int
) -> list[int]:
    """Returns the upper bounds, none above what there is, raised until they fill a sub-batch.

    What a small group leaves open goes to those with the lowest bound for their share first, which
    keeps the others in proportion.
    """
    widened = [min(pair) for pair in zip(most, available, strict=True)]
    order = [
        ((bound + 1) / share if share else math.inf, group)
        for group, (bound, share) in enumerate(zip(widened, shares, strict=True))
        if bound < available[group]
    ]
    heapq.heapify(order)
    for _ in range(batch_size - sum(widened)):
        _, group = order[0]
        widened[group] += 1
        if widened[group] == available[group]:
            heapq.heappop(order)
        else:
            share = shares[group]
            turn = (widened[group] + 1) / share if share else math.inf
            heapq.heapreplace(order, (turn, group))
    return widened


def _paced(totals: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Returns how many of each total must be there after each draw: in proportion, by remainders.

    Cumulative largest remainder: each place goes to the group that is furthest behind its
    proportion of all places so far, free places being a group of their own. So 1 of 16 examples
    falls due once in 16 chunks of one, and never are more due than a draw has places.
    """
    batch_size = sum(sizes)
    shares = [*totals, batch_size - sum(totals)]
    given = [0] * len(shares)
    rows = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        behind = [(given[g] * batch_size - share * end, g) for g, share in enumerate(shares)]
        heapq.heapify(behind)
        for _ in range(size):
            ahead, group = behind[0]
            given[group] += 1
            heapq.heapreplace(behind, (ahead + batch_size, group))
        rows.append(given[:-1])
    return rows


class Bounds:
    """Holds the draws of one sub-batch to its plan. Counts what was drawn, on the device."""

    def __init__(self, groups: Groups, sizes: Sequence[int], *, device: torch.device) -> None:
        members = groups.members()
        found = Counter(members)
        available = [found[group] for group in range(len(groups.quotas) + 1)]
        plan = plan_bounds(list(groups.quotas.values()), available, sizes)
        starts = [0, *accumulate(available[:-1])]
        numbers = torch.tensor([starts, *plan.asked, *plan.least, *plan.most])
        numbers = numbers.to(device, non_blocking=True)
        self._starts, self._asked = numbers[0], numbers[1:3]  # [G + 1], [2, G + 1]
        self._least, self._most = numbers[3:].chunk(2)  # [S, G + 1] each
        self._members = torch.tensor(members).to(device, non_blocking=True)
        self._places = torch.arange(len(members), device=device)
        self._counts = torch.zeros_like(self._starts)

    def restrict(self, keys: Tensor, draw: int) -> Tensor:
        """Returns the keys, +inf where the draw must take the candidate, -inf where it must not.

        Args:
          keys: `[B]`, by which candidates are drawn, -inf for those drawn before.
          draw: which of the S draws; -1, once all were made, for one that was put back.
        """
        ranks = self._ranks(keys)
        most = (self._most[draw] - self._counts)[self._members]
        least = (self._least[draw] - self._counts)[self._members]
        limited = keys.masked_fill(ranks >= most, -torch.inf)
        return limited.masked_fill(ranks < least, torch.inf)

    def count(self, drawn: Tensor, *, back: bool = False) -> None:
        """Takes note of the candidates that a draw took, or that are put back."""
        ones = torch.ones_like(drawn)
        self._counts.index_add_(0, self._members[drawn], ones, alpha=-1 if back else 1)

    def thresholds(self, left: Tensor, drawn: Tensor, draw: int) -> Tensor:
        """Returns the key that each of the drawn had to exceed: `[n]`, that of its best substitute.

        Where a floor is just met that is the best left of its own group, else the best left of all
        groups that are not full. Call it after `count`.

        Args:
          left: `[B]` keys, -inf for all that are drawn.
          drawn: `[n]` the candidates that the draw took.
          draw: as of `restrict`.
        """
        best = left.new_full(self._counts.shape, -torch.inf)
        best.scatter_reduce_(0, self._members, left, "amax")
        best_open = best.masked_fill(self._counts >= self._most[draw], -torch.inf).amax()
        is_needed = self._counts <= self._least[draw]
        thresholds = torch.where(is_needed, best, best.clamp_min(best_open))
        return thresholds[self._members[drawn]]

    def tally(self) -> tuple[Tensor, Tensor]:
        """Returns for the G quotas how many were drawn, and how many too many or (negative) few."""
        counts = self._counts[:-1]
        least, most = self._asked[:, :-1]
        return counts, (counts - most).clamp_min(0) - (least - counts).clamp_min(0)

    def _ranks(self, keys: Tensor) -> Tensor:
        """Returns how many of its own group have a larger key, for each candidate: `[B]`."""
        order = keys.argsort(descending=True)
        by_group = order[self._members[order].argsort(stable=True)]
        ranks = torch.empty_like(by_group)
        ranks[by_group] = self._places - self._starts[self._members[by_group]]
        return ranks
