"""Late train views, of the chosen alone, race those of all candidates: examples read per second.

    python tests/benchmarks/bench_late_views.py [--sizes 64 112 224] [--workers 0 2] [--rounds 7]

Pictures are 500 x 375 JPEGs, quality 90: crops of the photograph that matplotlib ships, with a
little noise, so that they take as long to decode as photographs do. Train view: open_clip's own, at
224 px. Late: `JESTDataset(transform=..., train_transform=...)`. Eager: each candidate is decoded
once, in full, and both views are made of it. `eager float` returns what the transforms return,
`eager uint8` keeps both views as uint8, which nobody gets for free: the harder opponent. Chosen is
by a reference that costs next to nothing, so that views are what is timed.

Rounds take each in turn, from starting the workers to the last batch, so that noise of the machine
hits all; medians of the rates and of the paired ratios are printed.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shards import write_tar  # noqa: E402

from jest_stream import JESTDataset, SelectionConfig  # noqa: E402

BATCH_SIZE, SUPER_BATCH_SIZE, TRAIN_SIZE = 64, 320, 224
TARGETS = {64: 2.0, 112: 1.5, 224: 1.0}  # of late against eager


class Cheap(nn.Module):
    """A two-tower model that looks at one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, image: Tensor, train: Tensor | None = None) -> Tensor:
        return image[:, :, 9, 9].float() @ self.image + 1

    def encode_text(self, text: Tensor) -> Tensor:
        return text.float()


def tokenize(text: str) -> Tensor:
    return torch.tensor([len(text), 1, 2, 3, 4, 5, 6, 7])


def both(image: Any, score: Callable[[Any], Tensor], train: Callable[[Any], Tensor]) -> Any:
    """Returns both views of a candidate, as a transform that knows no later does."""
    return {"image": score(image), "train": train(image)}


def pixels(image: Any, steps: list[Callable[[Any], Any]]) -> Tensor:
    """Returns a view as uint8."""
    for step in steps:
        image = step(image)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def write_pairs(folder: Path, num_shards: int, examples_per_shard: int) -> list[str]:
    """Writes shards of photographs with captions; returns their paths."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photograph = Image.open(path).convert("RGB")
    generator = np.random.default_rng(0)
    paths, num_bytes = [], 0
    for shard in range(num_shards):
        files = []
        for index in range(shard * examples_per_shard, (shard + 1) * examples_per_shard):
            width = int(512 * generator.uniform(0.6, 1))
            height = width * 3 // 4
            x, y = generator.integers(513 - width), generator.integers(601 - height)
            crop = photograph.crop((x, y, x + width, y + height)).resize((500, 375))
            noisy = np.asarray(crop) + generator.normal(0, 3, (375, 500, 1))
            data = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
            files += [(f"{index:06d}.jpg", data.getvalue()), (f"{index:06d}.txt", b"a person")]
            num_bytes += data.tell()
        paths.append(write_tar(folder / f"{shard:05d}.tar", files))
    num_pairs = num_shards * examples_per_shard
    print(f"{num_pairs} JPEGs of {num_bytes // num_pairs:,} bytes")
    return paths


def datasets_of(paths: list[str], size: int, num_workers: int) -> dict[str, JESTDataset]:
    """Returns what is compared."""
    score = image_transform(size, is_train=False)
    train = image_transform(TRAIN_SIZE, is_train=True)
    uint8 = [partial(pixels, steps=view.transforms[:-2]) for view in (score, train)]
    options: dict[str, Any] = {
        "reference": Cheap(),
        "tokenizer": tokenize,
        "selection": SelectionConfig(score="easy_reference"),
        "batch_size": BATCH_SIZE,
        "super_batch_size": SUPER_BATCH_SIZE,
        "num_workers": num_workers,
    }
    return {
        "late": JESTDataset(paths, transform=score, train_transform=train, **options),
        "eager uint8": JESTDataset(
            paths, transform=partial(both, score=uint8[0], train=uint8[1]), **options
        ),
        "eager float": JESTDataset(
            paths, transform=partial(both, score=score, train=train), **options
        ),
    }


def rate(dataset: JESTDataset, num_batches: int) -> float:
    """Returns examples read per second, over the next batches."""
    before = dataset.metrics()["samples_read"]
    start = time.perf_counter()
    for batch in islice(dataset, num_batches):
        assert len(batch[1]) == BATCH_SIZE
    seconds = time.perf_counter() - start
    return (dataset.metrics()["samples_read"] - before) / seconds


def compare(paths: list[str], size: int, num_workers: int, *, rounds: int, batches: int) -> None:
    """Prints one row."""
    datasets = datasets_of(paths, size, num_workers)
    for dataset in datasets.values():
        rate(dataset, 1)
    rates = [{name: rate(each, batches) for name, each in datasets.items()} for _ in range(rounds)]
    for dataset in datasets.values():
        dataset.close()
    shown = " ".join(
        f"{name} {statistics.median(row[name] for row in rates):6,.0f}/s" for name in datasets
    )
    ratios = [
        statistics.median(row["late"] / row[name] for row in rates)
        for name in ("eager uint8", "eager float")
    ]
    print(
        f"score view {size:3} px, {num_workers} workers: {shown}  "
        f"late x{ratios[0]:.2f} of uint8, x{ratios[1]:.2f} of float "
        f"(wanted x{TARGETS.get(size, 1.0):.1f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(TARGETS))
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=5, help="per round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("load", *(f"{load:.2f}" for load in os.getloadavg()), "before")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pairs(Path(folder), num_shards=8, examples_per_shard=80)
        for num_workers in arguments.workers:
            for size in arguments.sizes:
                compare(
                    paths, size, num_workers, rounds=arguments.rounds, batches=arguments.batches
                )
    print("load", *(f"{load:.2f}" for load in os.getloadavg()), "after")


if __name__ == "__main__":
    main()
