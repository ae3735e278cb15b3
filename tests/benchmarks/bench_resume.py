"""Resuming after a million examples is timed against reading them again.

    python tests/benchmarks/bench_resume.py --rounds 3

Writes 64 shards of tiny examples into a temporary folder (1 GB), reads a stream to the end of the
first million, and takes its state there. Then in turn, each in a new dataset: the time until the
first batch after loading that state, the time until the first batch of a run that begins (it reads
as many super-batches, so that the difference is what resuming itself costs), and the time until
the same batch where a loader can only read again from the start.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from jest_stream import JESTDataset, SelectionConfig

NUM_SHARDS = 64
BATCH_SIZE, SUPER_BATCH_SIZE = 256, 1280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, arguments.examples // NUM_SHARDS)
        num_steps = arguments.examples // SUPER_BATCH_SIZE
        state, expected = state_after(folder, num_steps, arguments.workers)
        times: dict[str, list[float]] = {"resumed": [], "begun": [], "read again": []}
        for _ in range(arguments.rounds):
            for kind, (loaded, skipped) in {
                "resumed": (state, 0),
                "begun": (None, 0),
                "read again": (None, num_steps),
            }.items():
                seconds, keys = first_batch(folder, loaded, skipped, arguments.workers)
                times[kind].append(seconds)
                assert keys == expected or kind == "begun"
    print(f"{arguments.examples:,} examples, {arguments.workers} workers, medians of", end=" ")
    print(f"{arguments.rounds}; step {num_steps}, super-batches of {SUPER_BATCH_SIZE}")
    for kind, seconds in times.items():
        shown = ", ".join(f"{each:.3f}" for each in sorted(seconds))
        print(f"{kind:>10}: {statistics.median(seconds):8.3f} s   ({shown})")
    pairs = zip(times["resumed"], times["begun"], strict=True)
    print(
        f"  resuming: {statistics.median(a - b for a, b in pairs):+8.3f} s beside a run that begins"
    )


def make_dataset(folder: Path, num_workers: int) -> JESTDataset:
    """Returns a dataset that reads super-batches whole and hands out a uniform part of each."""
    return JESTDataset(
        f"{folder}/*.tar",
        selection=SelectionConfig(method="uniform"),
        image_key="txt",
        transform=numbers,
        tokenizer=numbers,
        batch_size=BATCH_SIZE,
        super_batch_size=SUPER_BATCH_SIZE,
        num_workers=num_workers,
        as_dict=True,
    )


def numbers(text: str) -> torch.Tensor:
    """Returns something small that a view can be."""
    return torch.zeros(4)


def state_after(folder: Path, num_steps: int, num_workers: int) -> tuple[Any, list[str]]:
    """Returns the state after so many steps, and the keys of the next batch."""
    with make_dataset(folder, num_workers) as dataset:
        iterator = iter(dataset)
        for _ in islice(iterator, num_steps):
            pass
        state = dataset.state_dict()
        return state, next(iterator)["key"]


def first_batch(
    folder: Path, state: Any, num_skipped: int, num_workers: int
) -> tuple[float, list[str]]:
    """Returns the seconds from nothing until a batch is there, and its keys."""
    start = time.perf_counter()
    with make_dataset(folder, num_workers) as dataset:
        if state is not None:
            dataset.load_state_dict(state)
        keys: list[str] = next(islice(dataset, num_skipped, None))["key"]
        return time.perf_counter() - start, keys


def write_shards(folder: Path, examples_per_shard: int) -> None:
    """Writes shards of one short text each, 1 KiB of tar."""
    for shard in range(NUM_SHARDS):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            for index in range(examples_per_shard):
                info = tarfile.TarInfo(f"{shard:02d}-{index:06d}.txt")
                info.size = 8
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.write(f"{index:08d}".encode().ljust(512, b"\0"))
            num_bytes = file.tell() + 1024
            file.write(bytes(1024 + -num_bytes % 10240))


if __name__ == "__main__":
    main()
