"""Keeps draws to floors, caps and shares of groups, within the loop over chunks.

The group of every candidate and the quotas go in. Labels are known on the host, so `plan_bounds`
works out all numbers there, before the first draw: how many of each group must and may have been
drawn after each draw. `Bounds` then holds the draws to these numbers on the device, where scores
decide which groups get the free places. A draw that is put back and made again needs to keep only
to the bounds of the whole sub-batch.

G: groups with a quota; one more, the last, holds all other candidates. B: candidates, S: draws,
n: examples of a draw.
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
    """The group of each candidate, and how much of the sub-batch a group may make up."""

    labels: Sequence[Hashable] | Tensor
    """The labels of the B candidates: any values, or a `[B]` int64 tensor on the CPU."""
    quotas: Mapping[Hashable, Quota]
    """Quotas by label. Candidates with other labels are bound by nothing."""

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
        """Returns the group of each candidate: the position of its quota; G without one."""
        labels = self.labels.tolist() if isinstance(self.labels, Tensor) else self.labels
        number = {group: index for index, group in enumerate(self.quotas)}
        return [number.get(label, len(number)) for label in labels]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bounds the examples of each group in a sub-batch. Each list of groups is G + 1 long."""

    asked: tuple[list[int], list[int]]
    """The least and the most that the quotas ask for in the whole sub-batch."""
    least: list[list[int]]
    """After each of the S draws: how many must have been drawn so far."""
    most: list[list[int]]
    """After each of the S draws: how many may have been drawn so far."""


def plan_bounds(quotas: Sequence[Quota], available: Sequence[int], sizes: Sequence[int]) -> Plan:
    """Returns bounds that can be kept in every draw, as close to the quotas as candidates allow.

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
    # Two things can stand in the way of the quotas: a group has fewer candidates than its floor
    # (the floor sinks to all of them), or the caps together fill no batch (they are raised).
    attainable = [min(pair) for pair in zip(least, available, strict=True)]
    widened = _widened(most, available, [*(quota.most for quota in quotas), 1.0], batch_size)
    # Lower bounds after each draw: due in proportion, never more than its places.
    paced = _paced(attainable, sizes)
    # Upper bounds grow in proportion too, rounded up to leave room for each draw. A cap of 3 in 16
    # examples allows ceil(3 * 4 / 16) = 1 after 4 of them. No upper bound is below the lower one.
    paced_most = [
        [max(low, -(-high * end // batch_size)) for low, high in zip(row, widened, strict=True)]
        for end, row in zip(accumulate(sizes), paced, strict=True)
    ]
    return Plan(asked=(least, most), least=paced, most=paced_most)


def _widened(
    most: Sequence[int], available: Sequence[int], shares: Sequence[float], batch_size: int
) -> list[int]:
    """Returns the upper bounds, none above the group's candidates, raised to fill a sub-batch.

    Places that a small group leaves open go, one at a time, to the group with the lowest bound for
    its share, which keeps the others in proportion. Groups of share 0 come last.
    """
    # Of 100 examples, shares of 40, 30 and 30 % with only 3 candidates in the last group begin at
    # 40, 30 and 3 and end at 56, 41 and 3. A heap finds the next group of each place.
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
    """Returns how many of each total are due after each draw: in proportion, by remainders.

    Cumulative largest remainder: each place goes to the group that lacks most of its proportion of
    all places so far. Never are more due than a draw has places.
    """
    # Rounding each group up alone would make ten floors of 1 in 10 all due in the first chunk of
    # one. Places bound to no group count as a group here: 1 of 16 falls due once in 16 chunks of 1.
    batch_size = sum(sizes)
    shares = [*totals, batch_size - sum(totals)]
    given = [0] * len(shares)
    rows = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        # In units of 1 / batch_size places, to stay in integers: (given so far) - (proportion).
        surplus = [(given[g] * batch_size - share * end, g) for g, share in enumerate(shares)]
        heapq.heapify(surplus)
        for _ in range(size):
            least, group = surplus[0]
            given[group] += 1
            heapq.heapreplace(surplus, (least + batch_size, group))
        rows.append(given[:-1])
    return rows


class Bounds:
    """Holds the draws of one sub-batch to its plan. Counts the drawn examples, on the device."""

    def __init__(self, groups: Groups, sizes: Sequence[int], *, device: torch.device) -> None:
        members = groups.members()
        found = Counter(members)
        available = [found[group] for group in range(len(groups.quotas) + 1)]
        plan = plan_bounds(list(groups.quotas.values()), available, sizes)
        starts = [0, *accumulate(available[:-1])]
        # One copy to the device for all rows of G + 1 integers.
        numbers = torch.tensor([starts, *plan.asked, *plan.least, *plan.most])
        numbers = numbers.to(device, non_blocking=True)
        self._starts, self._asked = numbers[0], numbers[1:3]  # [G + 1], [2, G + 1]
        self._least, self._most = numbers[3:].chunk(2)  # [S, G + 1] each
        self._members = torch.tensor(members).to(device, non_blocking=True)
        self._places = torch.arange(len(members), device=device)
        self._counts = torch.zeros_like(self._starts)

    def restrict(self, keys: Tensor, draw: int) -> Tensor:
        """Returns the keys, +inf where the draw must take the candidate, -inf where it must not.

        A group of which the draw must take 1 and may take 3 has its best candidate at +inf, the
        next two at their own keys, and the rest at -inf.

        Args:
          keys: `[B]`, by which candidates are drawn, -inf for those drawn before.
          draw: number of the draw; -1, once all were made, for one that was put back.
        """
        ranks = self._ranks(keys)
        most = (self._most[draw] - self._counts)[self._members]
        least = (self._least[draw] - self._counts)[self._members]
        limited = keys.masked_fill(ranks >= most, -torch.inf)
        return limited.masked_fill(ranks < least, torch.inf)

    def count(self, drawn: Tensor, *, back: bool = False) -> None:
        """Counts the candidates that a draw took, or takes those put back out of the count."""
        ones = torch.ones_like(drawn)
        self._counts.index_add_(0, self._members[drawn], ones, alpha=-1 if back else 1)

    def thresholds(self, left: Tensor, drawn: Tensor, draw: int) -> Tensor:
        """Returns the key that each of the drawn had to exceed: `[n]`, that of its best substitute.

        Call it after `count`.

        Args:
          left: `[B]` keys, -inf for all that are drawn.
          drawn: `[n]` the candidates that the draw took.
          draw: as of `restrict`.
        """
        # The substitute of an example that is taken out again, in two cases:
        # 1. The group's floor is just met: only the best left of the same group can stand in.
        # 2. Else the best left of any group that is not full can. The group of the example is not
        #    full then, since the example has left its place.
        best = left.new_full(self._counts.shape, -torch.inf)
        best.scatter_reduce_(0, self._members, left, "amax")  # [G + 1]
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
        """Returns for each candidate how many of its group have a larger key: `[B]`."""
        # Keys [5, 9, 7, 8] of groups [0, 1, 0, 1]: by key the candidates are [1, 3, 2, 0], sorted
        # stably by group [2, 0, 1, 3]. Places [0, 1, 2, 3] less the groups' starts [0, 0, 2, 2] are
        # their ranks [0, 1, 0, 1]; by candidate [1, 0, 0, 1].
        order = keys.argsort(descending=True)
        by_group = order[self._members[order].argsort(stable=True)]
        ranks = torch.empty_like(by_group)
        ranks[by_group] = self._places - self._starts[self._members[by_group]]
        return ranks
