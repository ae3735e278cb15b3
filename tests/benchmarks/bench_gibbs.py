"""Joint selection, in chunks and sweeps, is compared with a Gibbs sampler.

    python tests/benchmarks/bench_gibbs.py        # B = 5,120, b = 1,024: about ten minutes
    python tests/benchmarks/bench_gibbs.py --reference-knows-candidates --reference-steps 3000

The question is how much of the learnability that a sub-batch can have they reach. The sampler is
the brute-force one that the paper's Fig. 2 measures by: it removes a random example of the
sub-batch and draws another in its place in proportion to e^(score given the rest), again and again.
Its sub-batches come up in proportion to e^(sum of all their pairs' scores). Two chains, from a
uniform and from a jointly selected sub-batch, must meet. L is the mean over the sub-batch of the
learnability of an example and its pairs, in nats. With `--reference-knows-candidates` the reference
is trained on the candidates too, so that it stays far ahead of the learner. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import naive  # noqa: E402
from bench_selection import machine  # noqa: E402
from icon_models import models_in_training  # noqa: E402

from jest_stream.selection.baselines import select_uniformly  # noqa: E402
from jest_stream.selection.joint import joint_selection  # noqa: E402
from jest_stream.types import Embeddings  # noqa: E402

PAPER = {1: 0.0, 2: 0.69, 4: 0.88, 8: 0.96, 16: 0.99, 32: 1.0}  # by chunks, read off its Fig. 2
SWEEPS = {8: (2,), 16: (1, 2, 4), 32: (2,)}  # by chunks


class Way(NamedTuple):
    """A way of selecting."""

    num_chunks: int
    num_sweeps: int = 0

    def __str__(self) -> str:
        sweeps = f" + {self.num_sweeps} sweep{'s' * (self.num_sweeps > 1)}"
        return f"{self.num_chunks:,}{sweeps if self.num_sweeps else ''}"


def ways(batch_size: int) -> list[Way]:
    """Returns what is compared: chunks alone, down to single examples, and chunks with sweeps."""
    alone = [Way(num_chunks) for num_chunks in (*PAPER, batch_size)]
    return alone + [Way(num, sweeps) for num, counts in SWEEPS.items() for sweeps in counts]


def learnability(scores: Tensor, chosen: Tensor) -> float:
    """Returns the mean over the chosen of the scores of all pairs among them."""
    return float(scores[chosen][:, chosen].double().sum() / len(chosen))


def gibbs(scores: Tensor, chosen: Tensor, *, num_sweeps: int, seed: int) -> list[float]:
    """Returns L after each sweep of as many replacements as there are examples.

    Args:
      scores: `[B, B]` of every pair.
      chosen: `[b]` where the chain starts.
    """
    generator = torch.Generator().manual_seed(seed)
    own = scores.diagonal()
    both = scores + scores.T
    both.fill_diagonal_(0.0)
    members = chosen.clone()
    given = own + both[members].sum(0)  # of each candidate, given the others in the sub-batch
    taken = torch.zeros_like(own)
    taken[members] = -torch.inf
    noise = torch.empty_like(own)
    trace = []
    for _ in range(num_sweeps):
        for place in torch.randint(len(members), (len(members),), generator=generator).tolist():
            removed = int(members[place])
            given -= both[removed]
            taken[removed] = 0.0
            keys = noise.exponential_(generator=generator).log_().neg_().add_(given).add_(taken)
            drawn = int(keys.argmax())
            members[place] = drawn
            given += both[drawn]
            taken[drawn] = -torch.inf
        trace.append(learnability(scores, members))
    return trace


@dataclass(frozen=True)
class Stage:
    """The learnability that each way reaches with the learner after some steps."""

    reached: dict[Way, float]
    """L, the mean of some sub-batches."""
    uniform: float
    """L of a uniform sub-batch."""
    traces: list[list[float]]
    """L after each sweep of the chain from uniform, and of that from 32 chunks with sweeps."""

    @property
    def converged(self) -> list[float]:
        """L over the last half of each chain."""
        return [statistics.mean(trace[len(trace) // 2 :]) for trace in self.traces]

    def closed(self, way: Way) -> float:
        """The share of the distance from one chunk to the sampler."""
        distance = statistics.mean(self.converged) - self.reached[Way(1)]
        return (self.reached[way] - self.reached[Way(1)]) / distance


def stage(learner: Embeddings, reference: Embeddings, options: argparse.Namespace) -> Stage:
    """Returns what is reached at one stage of training."""
    scores = naive.score_matrix(learner, reference, dtype=torch.float32)
    reached = {}
    for way in ways(options.batch_size):
        selections = [
            joint_selection(
                learner,
                reference,
                batch_size=options.batch_size,
                num_chunks=way.num_chunks,
                num_sweeps=way.num_sweeps,
                key=0,
                step=step,
            ).indices
            for step in range(options.draws)
        ]
        reached[way] = statistics.mean(learnability(scores, s) for s in selections)
    generator = torch.Generator().manual_seed(0)
    uniform = select_uniformly(len(scores), batch_size=options.batch_size, generator=generator)
    traces = [
        gibbs(scores, start, num_sweeps=options.sweeps, seed=seed)
        for seed, start in enumerate((uniform, selections[0]))
    ]
    return Stage(reached, learnability(scores, uniform), traces)


def report(stages: dict[int, Stage]) -> str:
    """Returns the tables."""
    steps = " | ".join(f"learner at {step:,}" for step in stages)
    ruler = "|---" * (len(stages) + 1) + "|"
    lines = [f"| chunks | {steps} | paper, Fig. 2 |", ruler + "---|"]
    for way in next(iter(stages.values())).reached:
        cells = [f"{stage.reached[way]:.2f} ({stage.closed(way):.0%})" for stage in stages.values()]
        is_in_paper = way.num_chunks in PAPER and not way.num_sweeps
        paper = f"{PAPER[way.num_chunks]:.0%}" if is_in_paper else ""
        lines.append(f"| {way} | {' | '.join(cells)} | {paper} |")
    converged = [f"{statistics.mean(stage.converged):.2f}" for stage in stages.values()]
    lines.append(f"| Gibbs, converged | {' | '.join(converged)} | 100% |")
    uniform = [f"{stage.uniform:.2f}" for stage in stages.values()]
    lines.append(f"| uniform | {' | '.join(uniform)} | |")
    lines += ["", f"| sweeps of the sampler | {steps} |", ruler]
    num_sweeps = len(next(iter(stages.values())).traces[0])
    for n in [n for n in (1, 2, 5, 10, 20, 50, 100) if n <= num_sweeps]:
        cells = [" / ".join(f"{t[n - 1]:.2f}" for t in stage.traces) for stage in stages.values()]
        lines.append(f"| {n}, from uniform / the last row | {' | '.join(cells)} |")
    cells = [" / ".join(f"{mean:.2f}" for mean in stage.converged) for stage in stages.values()]
    lines.append(f"| mean of the last half | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--super-batch-size", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learner-steps", type=int, nargs="+", default=[50, 100, 300, 1000])
    parser.add_argument("--reference-steps", type=int, default=1500)
    parser.add_argument("--reference-knows-candidates", action="store_true")
    parser.add_argument("--sweeps", type=int, default=50, help="of the sampler, default 50")
    parser.add_argument("--draws", type=int, default=5, help="sub-batches per number of chunks")
    options = parser.parse_args()
    learners, reference = models_in_training(
        options.super_batch_size,
        learner_steps=options.learner_steps,
        reference_steps=options.reference_steps,
        reference_knows_candidates=options.reference_knows_candidates,
    )
    stages = {}
    for step, learner in learners.items():
        stages[step] = stage(learner, reference, options)
        print(f"learner at {step}: L = {list(stages[step].reached.values())}", file=sys.stderr)
    print(
        f"B = {options.super_batch_size:,}, b = {options.batch_size:,}, mean of {options.draws} "
        f"sub-batches; reference after {options.reference_steps:,} steps"
        f"{', on the candidates too' * options.reference_knows_candidates}. L in nats, and the "
        f"share of the distance from one chunk to the sampler.\n\n{report(stages)}\n\n{machine()}"
    )


if __name__ == "__main__":
    main()
