"""Joint selection is timed beside the `[B, B]` matrix and beside its matrix products alone.

    python tests/benchmarks/bench_selection.py                  # B = 5,120
    python tests/benchmarks/bench_selection.py --paper-scale    # B = 163,840: about ten minutes
    python tests/benchmarks/bench_selection.py --growth         # B = 2,560, 5,120, ... 163,840

Every figure is a median of paired runs: the contenders take turns within one process, so that a
busy machine slows them alike. A ratio is the median of the ratios of the pairs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import naive  # noqa: E402

from jest_stream.selection.conditional import take  # noqa: E402
from jest_stream.selection.joint import joint_selection  # noqa: E402
from jest_stream.selection.losses import logit_tiles  # noqa: E402
from jest_stream.selection.sampling import gumbel_noise  # noqa: E402
from jest_stream.types import Embeddings  # noqa: E402

GIB = 2**30
JOINT = "joint_selection"
PRODUCTS = "its products alone, in its tiles"
LARGE = "its products alone, one per chunk"
LISTING = "paper's listing, [B, B]"


def embeddings(num_examples: int, dim: int, *, scale: float, seed: int) -> Embeddings:
    """Returns unit-norm embeddings at random, made in blocks so that memory does not peak here."""
    generator = torch.Generator().manual_seed(seed)
    towers = [torch.empty(num_examples, dim) for _ in range(2)]
    for block in zip(*(tower.split(4096) for tower in towers), strict=True):
        common = torch.randn(len(block[0]), dim, generator=generator)
        for rows in block:
            rows.normal_(generator=generator).add_(common)
            rows.div_(rows.norm(dim=1, keepdim=True))
    return Embeddings(image=towers[0], text=towers[1], logit_scale=scale, logit_bias=-10.0)


class Contenders:
    """The same selection in several ways; each run repeats it on the same noise."""

    def __init__(
        self, num_examples: int, batch_size: int, num_chunks: int, dim: int, num_sweeps: int = 0
    ) -> None:
        self.models = [embeddings(num_examples, dim, scale=s, seed=int(s)) for s in (20.0, 60.0)]
        self.batch_size = batch_size
        self.num_chunks = num_chunks
        self.num_sweeps = num_sweeps
        # Any rows will do. The last chunk is drawn, but nothing is conditioned on it.
        chunks = list(torch.arange(batch_size).tensor_split(num_chunks))
        self.chunks = (chunks * (1 + num_sweeps))[:-1]

    def select(self) -> Tensor:
        """Returns what `joint_selection` chooses."""
        return joint_selection(
            *self.models,
            batch_size=self.batch_size,
            num_chunks=self.num_chunks,
            num_sweeps=self.num_sweeps,
            key=0,
            step=0,
        ).indices

    def products(self) -> None:
        """Makes the matrix products of `select` in the same tiles, and nothing of them."""
        for chunk in self.chunks:
            for _ in logit_tiles(self.models, take(self.models, chunk), with_bias=False):
                pass

    def large_products(self) -> None:
        """Makes the same products in one piece per chunk, model and side."""
        for chunk in self.chunks:
            for model, chosen in zip(self.models, take(self.models, chunk), strict=True):
                torch.mm(model.image, chosen.text.T)
                torch.mm(model.text, chosen.image.T)

    def listing(self) -> Tensor:
        """Returns what the paper's listing chooses, the matrix included, in float32."""
        num_examples = len(self.models[0].image)
        positions = torch.arange(num_examples)
        noise = [gumbel_noise(0, 0, k, positions) for k in range(self.num_chunks)]
        scores = naive.score_matrix(*self.models, dtype=torch.float32)
        return naive.paper_listing(
            scores,
            batch_size=self.batch_size,
            num_chunks=self.num_chunks,
            noise=torch.stack(noise),
        )[0]


def paired(contenders: dict[str, Callable[[], object]], num_pairs: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender's runs, run i of all of them side by side."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for pair in range(num_pairs):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            print(f"pair {pair + 1}/{num_pairs} {name}: {seconds[name][-1]:.3f} s", file=sys.stderr)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Returns the medians, and how long `joint_selection` takes relative to each contender."""
    lines = ["| | median s | joint_selection takes |", "|---|---|---|"]
    for name, runs in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[JOINT], runs, strict=True))
        relative = f"{ratio:.2f} x" if ratio > 0.5 else f"1 / {1 / ratio:.1f}"
        lines.append(f"| {name} | {statistics.median(runs):.3f} | {relative} |")
    return "\n".join(lines)


def machine() -> str:
    """Returns what the figures were measured on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}, "
        f"commit {commit or 'none'}"
    )


def peak_bytes() -> int:
    """Returns the most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(arguments: argparse.Namespace, num_examples: int, *, is_large: bool) -> str:
    """Returns a heading with the peak of memory, and the table."""
    Contenders(64, 16, 4, arguments.dim).select()  # loads what libraries load at first use
    batch_size = round(num_examples * (1 - arguments.filter_ratio))
    contenders = Contenders(
        num_examples, batch_size, arguments.num_chunks, arguments.dim, arguments.num_sweeps
    )
    runs: dict[str, Callable[[], object]] = {
        JOINT: contenders.select,
        PRODUCTS: contenders.products,
    }
    before = psutil.Process().memory_info().rss
    if is_large:
        seconds = paired(runs, arguments.pairs)
        peak = peak_bytes() - before
    else:
        selected = set(contenders.select().tolist())
        peak = peak_bytes() - before
        agree = len(selected & set(contenders.listing().tolist()))
        print(f"{agree} of {batch_size} choices agree with the listing", file=sys.stderr)
        runs |= {LARGE: contenders.large_products, LISTING: contenders.listing}
        seconds = paired(runs, arguments.pairs)
    return (
        f"B = {num_examples:,}, b = {batch_size:,}, {arguments.num_chunks} chunks, "
        f"{arguments.num_sweeps} sweeps, "
        f"D = {arguments.dim}; {arguments.pairs} pairs; peak memory {max(peak, 0) / GIB:.2f} GiB "
        f"above the embeddings\n\n{table(seconds)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--super-batch-size", type=int, default=5120)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--num-chunks", type=int, default=16)
    parser.add_argument("--num-sweeps", type=int, default=0, help="the listing has none")
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--pairs", type=int, default=5, help="paired runs, default 5")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--paper-scale", action="store_true", help="B = 163,840, one pair")
    parser.add_argument("--growth", action="store_true", help="B = 2,560 to 163,840")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.paper_scale:
        arguments.pairs = 1
        print(report(arguments, 163_840, is_large=True))
    elif arguments.growth:
        for exponent in range(7):
            if exponent == 5:
                arguments.pairs = 1  # of minutes each
            print(report(arguments, 2560 * 2**exponent, is_large=True))
    else:
        print(report(arguments, arguments.super_batch_size, is_large=False))
    print(machine())


if __name__ == "__main__":
    main()
