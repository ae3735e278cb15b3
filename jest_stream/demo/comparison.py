"""Compares two runs: a table, and a verdict that claims no more than the figures carry.

Only measured points are compared: the end of the uniform run with the JEST run at as many steps,
and at its last test before it had cost more FLOPs, or more time. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jest_stream.demo.training import Recall

CLEAR = 2.0
"""A difference counts from so many standard errors on."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The cost of a run and the accuracy of its model, at one test."""

    steps: int
    scored: int
    """Scored candidates, those of the super-batch in flight included."""
    trained: int
    """Pairs that were trained on."""
    flops: float
    """Of training, scoring and selection; tests are not counted."""
    seconds: float
    """Wall time likewise, reading included."""
    accuracy: Mapping[str, Recall]
    """By domain."""


Curve = Sequence[CurvePoint]
"""The tests of one run, the untrained model first."""

COSTS: dict[str, Callable[[CurvePoint], float]] = {
    "steps": lambda point: point.steps,
    "FLOPs": lambda point: point.flops,
    "wall time": lambda point: point.seconds,
}


def compare(uniform: Curve, jest: Curve) -> dict[str, CurvePoint]:
    """Returns the end of the uniform run, and JEST's points at equal steps, FLOPs and time."""
    rows = {"uniform": uniform[-1]}
    for name, cost in COSTS.items():
        # Never empty: the untrained model cost nothing.
        rows[f"JEST, equal {name}"] = [at for at in jest if cost(at) <= cost(uniform[-1])][-1]
    return rows


def table(rows: Mapping[str, CurvePoint]) -> str:
    """Returns the rows as an aligned Markdown table."""
    domains = list(next(iter(rows.values())).accuracy)
    cells = [["", "steps", "scored", "trained", "TFLOP", "seconds"]]
    cells[0] += [f"{domain} R@1 / R@5" for domain in domains]
    for name, at in rows.items():
        costs = [f"{at.steps:,}", f"{at.scored:,}", f"{at.trained:,}", f"{at.flops / 1e12:.2f}"]
        recalls = [at.accuracy[domain] for domain in domains]
        accuracy = [f"{recall.at_1:.1f} / {recall.at_5:.1f} %" for recall in recalls]
        cells.append([name, *costs, f"{at.seconds:.0f}", *accuracy])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(uniform: Curve, jest: Curve, num_pairs: Mapping[str, int]) -> list[str]:
    """Returns sentences that say no more than the figures: on the costs, then on each domain.

    Args:
      uniform: the tests of the uniform run.
      jest: the tests of the JEST run.
      num_pairs: number of pairs that each domain was tested on.
    """
    ratios = [
        f"{COSTS[name](jest[-1]) / COSTS[name](uniform[-1]):.1f} times the {name}"
        for name in ("FLOPs", "wall time")
    ]
    return [
        f"The JEST run took {' and '.join(ratios)} of the uniform run.",
        *(_judge(uniform, jest, domain, count) for domain, count in num_pairs.items()),
    ]


def clear_sign(recall: float, other: float, num_pairs: int) -> int:
    """Returns 1 if `recall` is clearly above `other`, -1 if clearly below, else 0. In percent.

    Clear is a difference of more than `CLEAR` standard errors of two binomial shares.
    """
    # Both directions of retrieval share the pairs: each pair counts once, not twice.
    # 60 % against 50 % of 1,000 pairs: the error is 2.2, so 10 is clear; of 100 pairs it is 7.0.
    error = math.sqrt(sum(share * (100 - share) for share in (recall, other)) / num_pairs)
    difference = recall - other
    return 0 if abs(difference) <= CLEAR * error else int(math.copysign(1, difference))


def _judge(uniform: Curve, jest: Curve, domain: str, num_pairs: int) -> str:
    """Says of one domain whether selection paid, by R@5 with its sampling error."""
    # There are three cases: 1. no run learnt anything clearly, so that nothing can be said; JEST is
    # 2. clearly ahead by at least one cost, or 3. by none.
    end, *rows = compare(uniform, jest).values()
    goal, untrained = end.accuracy[domain].at_5, uniform[0].accuracy[domain].at_5
    recalls = [row.accuracy[domain].at_5 for row in rows]
    if not any(clear_sign(recall, untrained, num_pairs) > 0 for recall in (goal, *recalls)):
        return (
            f"{domain}: too short a run to tell. R@5 is {goal:.1f} % with uniform batches, not "
            f"clearly above the {untrained:.1f} % of the untrained model."
        )
    signs = [clear_sign(recall, goal, num_pairs) for recall in recalls]
    words = {1: "ahead", 0: "not clearly different", -1: "behind"}
    found = [
        f"{words[sign]} at equal {name} (R@5 {recall:.1f} against {goal:.1f} %)"
        for name, sign, recall in zip(COSTS, signs, recalls, strict=True)
    ]
    paid = [name for name, sign in zip(COSTS, signs, strict=True) if sign > 0]
    conclusion = f"Selection paid at equal {_listed(paid)}" if paid else "Selection did not pay"
    return f"{domain}: {conclusion}. JEST is {_listed(found)}. {_catching_up(end, jest, domain)}"


def _catching_up(uniform: CurvePoint, jest: Curve, domain: str) -> str:
    """Says when JEST first was as good as the uniform run in the end."""
    goal = uniform.accuracy[domain].at_5
    reached = [at for at in jest if at.steps > 0 and at.accuracy[domain].at_5 >= goal]
    if not reached:
        return f"In {jest[-1].steps:,} steps it did not reach the uniform run's {goal:.1f} %."
    first = reached[0]
    shares = [f"{cost(first) / cost(uniform):.0%} of the {name}" for name, cost in COSTS.items()]
    return f"It was first as good as the uniform run in the end after {_listed(shares)}."


def _listed(parts: Sequence[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
