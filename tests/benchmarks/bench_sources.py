"""Samples per second of `TarSource` against webdataset: same shards, same decoding, one run.

    python tests/benchmarks/bench_sources.py [--shards 8] [--examples 1000] [--rounds 7]

Rounds alternate between the two, so that noise of the machine hits both; medians and the median
of the paired ratios are printed. `encoded` reads members only, `decoded` also makes a PIL image,
a str and parsed json of each example. Workers: our `BlockReader` against webdataset in torch's
`DataLoader`, both handing over the decoded image as a tensor.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards import write_shards  # noqa: E402

from jest_stream.sources import TarSource  # noqa: E402
from jest_stream.sources.decode import Decoded  # noqa: E402
from jest_stream.sources.workers import BlockReader  # noqa: E402
from jest_stream.types import Cursor  # noqa: E402

BLOCK_SIZE = 32


def plain_decode(example: dict[str, Any]) -> dict[str, Any]:
    """Returns what both decode to; written as a webdataset user would."""
    return {
        "image": Image.open(io.BytesIO(example["jpg"])).convert("RGB"),
        "text": example["txt"].decode(),
        "json": json.loads(example["json"]),
    }


def our_decode(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the same through the allow-list and its limits."""
    decoded = Decoded(example)
    return {"image": decoded["jpg"], "text": decoded["txt"], "json": decoded["json"]}


def to_tensors(decoded: dict[str, Any]) -> dict[str, Any]:
    """Returns what is handed over between processes."""
    return {"image": torch.from_numpy(np.array(decoded["image"])), "text": decoded["text"]}


def our_prepare(example: dict[str, Any]) -> dict[str, Any]:
    return to_tensors(our_decode(example))


def plain_prepare(example: dict[str, Any]) -> dict[str, Any]:
    return to_tensors(plain_decode(example))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns items as columns."""
    return {
        "image": torch.stack([item["image"] for item in items]),
        "text": [item["text"] for item in items],
    }


def webdataset_samples(paths: list[str]) -> webdataset.WebDataset:
    """Returns webdataset's reader, without a decoder or shuffling of its own."""
    return webdataset.WebDataset(
        paths, shardshuffle=False, empty_check=False, workersplitter=webdataset.split_by_worker
    )


def ours(paths: list[str], decode: Callable[[Any], Any] | None) -> Iterator[Any]:
    source = TarSource(paths)
    for shard in range(source.num_shards):
        for example, _ in source.read(shard):
            yield decode(example) if decode else example


def theirs(paths: list[str], decode: Callable[[Any], Any] | None) -> Iterator[Any]:
    for example in webdataset_samples(paths):
        yield decode(example) if decode else example


def our_workers(paths: list[str], num_workers: int) -> Iterator[int]:
    source = TarSource(paths)
    lanes = range(len(paths))
    reader = BlockReader(
        source,
        lanes=lanes,
        num_lanes=len(lanes),
        seed=0,
        cursors=dict.fromkeys(lanes, Cursor(0, 0, 0, 0)),
        block_size=BLOCK_SIZE,
        prepare=our_prepare,
        collate=collate,
        end_epoch=1,
        on_bad_example="raise",
        num_workers=num_workers,
        timeout_s=60,
    )
    while (block := reader.read()) is not None:
        yield from range(block.num_examples)


def their_workers(paths: list[str], num_workers: int) -> Iterator[int]:
    dataset = webdataset_samples(paths).map(plain_prepare).batched(BLOCK_SIZE, collate)
    for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers):
        yield from range(len(batch["text"]))


def rate(samples: Iterator[Any]) -> float:
    """Returns samples per second; the samples are dropped as they come."""
    start = time.perf_counter()
    count = sum(1 for _ in samples)
    return count / (time.perf_counter() - start)


def compare(name: str, rounds: int, our: Callable[[], Any], their: Callable[[], Any]) -> float:
    """Prints the medians of both and returns the median of the paired ratios."""
    rate(our())
    rate(their())
    pairs = [(rate(our()), rate(their())) for _ in range(rounds)]
    our_rate, their_rate = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:<22} ours {our_rate:8,.0f}/s  webdataset {their_rate:8,.0f}/s  x{ratio:.2f}")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1000, help="per shard")
    parser.add_argument("--size", type=int, default=96, help="of an image, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--paths", nargs="*", help="shards to read instead of drawn ones")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="webdataset")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.paths or write_shards(
            Path(folder),
            num_shards=arguments.shards,
            examples_per_shard=arguments.examples,
            size=arguments.size,
        )
        rounds = arguments.rounds
        compare("encoded", rounds, lambda: ours(paths, None), lambda: theirs(paths, None))
        compare(
            "decoded",
            rounds,
            lambda: ours(paths, our_decode),
            lambda: theirs(paths, plain_decode),
        )
        for num_workers in (1, 2):
            compare(
                f"decoded, {num_workers} workers",
                rounds,
                lambda n=num_workers: our_workers(paths, n),
                lambda n=num_workers: their_workers(paths, n),
            )


if __name__ == "__main__":
    main()
