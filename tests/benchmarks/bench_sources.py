"""`TarSource` races webdataset and `datasets`: samples per second, same shards, same decoding.

    python tests/benchmarks/bench_sources.py [--shards 8] [--examples 1000] [--rounds 7]

The shards are real: the demo's icons at 96 px as JPEG, with their names and a json. Rounds
alternate between two readers, so that noise of the machine hits both; medians and the median of
the paired ratios are printed, and the machine's load before and after. `encoded` reads members
only, `decoded` also makes a PIL image, a str and parsed json of each example. Workers: our
`BlockReader` against webdataset in torch's `DataLoader`, both handing over the decoded image as a
tensor. `datasets` is told not to decode images: the same function does.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shards import members, write_tar  # noqa: E402

from jest_stream.demo import data  # noqa: E402
from jest_stream.sources.reader import BlockReader  # noqa: E402
from jest_stream.sources.tar import TarSource  # noqa: E402
from jest_stream.types import Cursor  # noqa: E402
from jest_stream.views.decode import Decoded  # noqa: E402

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


def streamed(paths: list[str]) -> Iterator[Any]:
    """Yields what `datasets` streams; it parses text and json by itself."""
    from datasets import load_dataset

    files = {"train": paths}
    stream = load_dataset("webdataset", data_files=files, split="train", streaming=True)
    for example in stream.decode(False):
        image = Image.open(io.BytesIO(example["jpg"]["bytes"])).convert("RGB")
        yield {"image": image, "text": example["txt"], "json": example["json"]}


def write_icons(folder: Path, *, num_shards: int, examples_per_shard: int, size: int) -> list[str]:
    """Writes the demo's icons as JPEGs of `size` pixels with text and json; returns the paths."""
    source = TarSource(data.unpack(folder / "unpacked"))
    examples = (example for shard in range(source.num_shards) for example, _ in source.read(shard))
    paths = []
    for shard in range(num_shards):
        rows = []
        for example in islice(examples, examples_per_shard):
            decoded = Decoded(example)
            name = next(name for name in ("png", "webp", "jpg") if name in decoded)
            stream = io.BytesIO()
            image = decoded[name].resize((size, size), Image.Resampling.BICUBIC)
            image.save(stream, "JPEG", quality=90)
            record = {"text": decoded["txt"], "size": size, "key": example["__key__"]}
            rows.append(
                {
                    "__key__": f"{shard:03d}{len(rows):05d}",
                    "jpg": stream.getvalue(),
                    "txt": example["txt"],
                    "json": json.dumps(record).encode(),
                }
            )
        paths.append(write_tar(folder / f"icons-{shard:05d}.tar", members(rows)))
    return paths


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


def compare(
    name: str, rounds: int, our: Callable[[], Any], their: Callable[[], Any], who: str
) -> float:
    """Prints the medians of both and returns the median of the paired ratios."""
    rate(our())
    rate(their())
    pairs = [(rate(our()), rate(their())) for _ in range(rounds)]
    our_rate, their_rate = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:<22} ours {our_rate:8,.0f}/s  {who:<10} {their_rate:8,.0f}/s  x{ratio:.2f}")
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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported
    print("load", *(f"{load:.2f}" for load in os.getloadavg()), "before")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", folder)
        paths = arguments.paths or write_icons(
            Path(folder),
            num_shards=arguments.shards,
            examples_per_shard=arguments.examples,
            size=arguments.size,
        )
        compare_all(paths, arguments.rounds)
    print("load", *(f"{load:.2f}" for load in os.getloadavg()), "after")


def compare_all(paths: list[str], rounds: int) -> None:
    """Prints every comparison."""
    compare("encoded", rounds, lambda: ours(paths, None), lambda: theirs(paths, None), "webdataset")

    def decoded() -> Iterator[Any]:
        return ours(paths, our_decode)

    compare("decoded", rounds, decoded, lambda: theirs(paths, plain_decode), "webdataset")
    compare("decoded", rounds, decoded, lambda: streamed(paths), "datasets")
    for num_workers in (1, 2):
        compare(
            f"decoded, {num_workers} workers",
            rounds,
            lambda n=num_workers: our_workers(paths, n),
            lambda n=num_workers: their_workers(paths, n),
            "webdataset",
        )


if __name__ == "__main__":
    main()
