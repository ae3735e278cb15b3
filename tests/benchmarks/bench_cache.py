"""This benchmark scores from a reference cache and from a live reference, and reads a cache alone.

    python tests/benchmarks/bench_cache.py [--rounds 15] [--examples 160000] [--dimension 512]

Scoring: the demo's model learns from the demo's icons, B = 1,280, b = 256; its reference, of the
learner's size, either runs or was cached. Steps of the two alternate, so that noise of the machine
hits both. `scoring` is the stage of that name in `metrics()`: learner and reference, or learner and
the conversion of cached rows into embeddings; `data` holds reading, decoding and, with the cache,
the join. Medians of the steps, and the median of the paired ratios.

Reading: examples per second of the join alone, over examples that hold nothing but their key, up to
the stacked `[n, D]` float16 columns of both towers, in one process. From files that the system has
in memory, and from files that it was told to forget. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_selection import machine  # noqa: E402

from jest_stream import JESTDataset, ReferenceCache  # noqa: E402
from jest_stream.demo.data import full_view, unpack  # noqa: E402
from jest_stream.demo.model import HashTokenizer, TwoTowerModel  # noqa: E402
from jest_stream.types import REFERENCE_ROW, Example  # noqa: E402
from jest_stream.views.columns import gather_rows  # noqa: E402

STAGES = ("data", "scoring", "selecting", "yielding")
BLOCK_SIZE = 64


class Keys:
    """Shards of examples that are nothing but a key, so nothing but the join takes time."""

    def __init__(self, num_shards: int, per_shard: int) -> None:
        self.num_shards = num_shards
        self._per_shard = per_shard

    @property
    def fingerprint(self) -> str:
        return f"keys:{self.num_shards}:{self._per_shard}"

    def shard_name(self, shard: int) -> str:
        return f"{shard:05d}.keys"

    def keys(self, shard: int) -> list[str]:
        """Returns what the shard's examples are called: as long as a hash or a file name."""
        return [f"example/{shard:05d}/{index:08d}" for index in range(self._per_shard)]

    def read(self, shard: int, *, offset: int = 0, index: int = 0) -> Iterator[tuple[Example, int]]:
        for key in self.keys(shard)[index:]:
            yield {"__key__": key}, 0


class Vectors(torch.nn.Module):
    """A reference that costs nothing: its inputs are embeddings already."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return text


def write_cache(source: Keys, folder: str, dimension: int) -> ReferenceCache:
    """Builds a cache of random vectors for the keys."""
    pool = torch.randn(4096, dimension, generator=torch.Generator().manual_seed(0))

    def vector(decoded: Any) -> torch.Tensor:
        return pool[int(decoded["__key__"][-8:]) % 4096]

    return ReferenceCache.build(
        source, Vectors(), folder, image_key=vector, text_key=vector, micro_batch_size=4096
    )


def join_seconds(source: Keys, cache: ReferenceCache, *, is_stacked: bool) -> float:
    """Returns how long it takes to read everything; `is_stacked`: as columns of blocks."""
    joined = cache.join(source)
    start = time.perf_counter()
    for shard in range(source.num_shards):
        examples = joined.read(shard)
        if not is_stacked:
            for _ in examples:
                pass
            continue
        while rows := [example[REFERENCE_ROW] for example, _ in islice(examples, BLOCK_SIZE)]:
            gather_rows(rows)
    return time.perf_counter() - start


def forget(folder: str) -> None:
    """Tells the system to drop the files of a folder from its memory."""
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(num_examples: int, dimension: int, rounds: int) -> None:
    """Prints examples per second of the join."""
    source = Keys(8, num_examples // 8)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(source, folder, dimension)
        print(f"\n{cache.summary()}\n\n| reading the cache alone | examples/s | least | most |")
        print("|-|-:|-:|-:|")
        for name, is_stacked, is_cold in (
            ("rows beside the examples", False, False),
            ("stacked in blocks of 64", True, False),
            ("stacked, not in the system's memory", True, True),
        ):
            join_seconds(source, cache, is_stacked=is_stacked)
            rates = []
            for _ in range(rounds):
                if is_cold:
                    forget(folder)
                seconds = join_seconds(source, cache, is_stacked=is_stacked)
                rates.append(cache.num_examples / seconds)
            print(
                f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} "
                f"| {max(rates):,.0f} |",
                flush=True,
            )


def stage_seconds(dataset: JESTDataset, iterator: Iterator[Any]) -> dict[str, float]:
    """Returns what each stage of the next step takes, and the whole step."""
    before, start = dataset.metrics(), time.perf_counter()
    next(iterator)
    total = time.perf_counter() - start
    after = dataset.metrics()
    return {**{name: after[f"{name}_s"] - before[f"{name}_s"] for name in STAGES}, "step": total}


def scoring(rounds: int, num_shards: int) -> None:
    """Prints the time of a step with a live and with a cached reference."""
    torch.manual_seed(0)
    model, reference = TwoTowerModel(), TwoTowerModel()
    shards = unpack()[:num_shards]
    views: dict[str, Any] = {"transform": full_view, "tokenizer": HashTokenizer()}
    options: dict[str, Any] = {**views, "batch_size": 256, "filter_ratio": 0.8, "lookahead": 0}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = ReferenceCache.build(shards, reference, folder, **views)
        print(f"{cache.summary()}; built in {time.perf_counter() - start:.1f} s\n")
        with (
            JESTDataset(shards, learner=model, reference=reference, **options) as live,
            JESTDataset(shards, learner=model, reference=folder, **options) as cached,
        ):
            datasets = [(live, iter(live)), (cached, iter(cached))]
            for pair in datasets:
                stage_seconds(*pair)
            rows = [[stage_seconds(*pair) for pair in datasets] for _ in range(rounds)]
    print("| seconds per step | live | cached | live / cached |\n|-|-:|-:|-:|")
    for name in (*STAGES, "scoring and selecting", "step"):
        parts = name.split(" and ")
        pairs = [[sum(of[part] for part in parts) for of in row] for row in rows]
        lives, caches = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        print(
            f"| {name} | {lives:.3f} | {caches:.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shards", type=int, default=8, help="of the demo's icons, of 32")
    parser.add_argument("--examples", type=int, default=160_000, help="keys that are read")
    parser.add_argument(
        "--dimension", type=int, default=512, help="of the embeddings that are read"
    )
    options = parser.parse_args()
    print(f"{machine()}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    scoring(options.rounds, options.shards)
    reading(options.examples, options.dimension, min(options.rounds, 7))


if __name__ == "__main__":
    main()
